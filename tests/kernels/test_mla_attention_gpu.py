"""The GPU kernel of paged latent attention equals `reference`, in interpret mode: its arithmetic, not its speed."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # Where it says whether it saw a race.

from kernels_pallas._paged.gpu import choose_splits
from kernels_pallas.mla_attention import MASK_BITS, mla_attention
from kernels_pallas.mla_attention.pallas_gpu import mla_attention_pallas_gpu
from tests.kernels import test_mla_attention_tpu as tpu
from tests.kernels.gpu_interpreter import FIND_RACES, HAS_GPU, INTERPRET
from tests.quick import quick_jit

HEADS, WIDTH, VALUE, PAGE, PAGES, SCALE = 4, 192, 128, 16, 10, 0.1
CONTEXT = PAGE * PAGES
pytestmark = pytest.mark.usefixtures("gpu_interpreter")


def make_case(lengths, tokens, *, heads=HEADS, page=PAGE, row_width=WIDTH, dtype=jnp.bfloat16, **options):
    """As for the TPU kernel: large numbers in slots that nobody may see, NaN in pages that nobody may fetch."""
    shape = (heads, WIDTH, row_width, page, CONTEXT // page)
    return tpu.make_case(lengths, tokens, dtype=dtype, shape=shape, **options)


@cache
def attend_with(interpret, **options):
    return quick_jit(
        lambda *arrays: mla_attention_pallas_gpu(
            *arrays, *(None,) * (6 - len(arrays)), value_width=VALUE, scale=SCALE, interpret=interpret, **options
        )
    )


def reference(case):
    """What `reference` says in float32."""
    q, pages, *others = case
    return tpu.reference([q.astype(np.float32), pages.astype(np.float32), *others], value_width=VALUE, scale=SCALE)


def check(case, interpret=INTERPRET, **options):
    got = attend_with(interpret, **options)(*map(jnp.asarray, case))
    assert got.dtype == jnp.bfloat16
    got = np.asarray(got, np.float32)
    # Weights and results are rounded to bfloat16.
    np.testing.assert_allclose(got, reference(case), rtol=1e-2, atol=1e-2)
    assert not got[case[3] == 0].any()


LENGTHS = st.sampled_from([0, 1, PAGE - 1, PAGE, 63, 64, 65, 4 * PAGE + 1, CONTEXT - 1, CONTEXT])


@settings(max_examples=6, deadline=None)
@given(st.lists(LENGTHS, min_size=3, max_size=3), st.sampled_from([1, 3]), st.integers(0, 9))
def test_ragged_contexts(lengths, num_splits, seed):
    check(make_case(lengths, 2, seed=seed), num_splits=num_splits)


TREE_LENGTHS = st.integers(1, CONTEXT - MASK_BITS)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(TREE_LENGTHS, st.sampled_from([0, 1, 2, 20, 33])), min_size=2, max_size=2), st.integers(0, 9))
def test_trees_from_one_node_to_as_many_as_a_mask_can_name(requests, seed):
    """33 tokens of four heads are three blocks of rows."""
    lengths, nodes = zip(*requests, strict=True)
    check(make_case(lengths, 33, nodes=nodes, seed=seed), num_splits=2)


@pytest.mark.parametrize(
    ("row_blocks", "max_tokens", "expected"),
    [
        (4, 65536, 33),  # 132 parts, one for each multiprocessor.
        (64, 8192, 2),
        (67, 8192, 3),  # Two waves of thirds and their sums in place of one of wholes: a ninth less.
        (67, 131_072, 7),  # 469 parts in four waves, in place of one wave that leaves half of them idle.
        (133, 131_072, 3),  # Four waves of a third in place of two, the second of one context.
        (132, 131_072, 1),
        (1024, 131_072, 1),
        (70, 2048, 1),  # There the sums cost more.
        (1, 64, 1),
    ],
)
def test_contexts_are_divided_where_that_fills_the_multiprocessors(row_blocks, max_tokens, expected):
    assert choose_splits(row_blocks, max_tokens, 512, 576 * 2) == expected


@pytest.mark.parametrize("num_splits", [1, 2])
def test_two_warpgroups_share_the_columns_of_a_value(num_splits):
    check(make_case((100, 20), 3, nodes=(2, 3)), num_splits=num_splits, value_parts=2)


def test_prompt_slices_see_their_own_beginnings():
    check(make_case((130, 20, 7), 20), num_splits=1)


SLOW_PAGES = [pytest.param(page, marks=pytest.mark.slow) for page in (8, 32)]


@pytest.mark.parametrize("page", [*SLOW_PAGES, 64])
def test_pages_that_are_a_part_of_a_block_or_all_of_it(page):
    """Contexts end within a page; 160 tokens are no multiple of 64, so that pages of 64 have a last block in use."""
    case = tpu.make_case((70, 1, 128), 1, dtype=jnp.bfloat16, shape=(HEADS, WIDTH, WIDTH, page, 192 // page))
    check(case, num_splits=1)


def test_pages_of_several_blocks():
    case = tpu.make_case((70, 1, 250), 1, dtype=jnp.bfloat16, shape=(HEADS, WIDTH, WIDTH, 128, 2))
    check(case, num_splits=2)


def test_padding_of_cache_rows_is_not_read():
    case = make_case((40, 100), 1, row_width=256)
    case[1][:, :, WIDTH:] = np.nan
    got = attend_with(INTERPRET, num_splits=1)(*map(jnp.asarray, case))
    case[1] = case[1][:, :, :WIDTH]
    np.testing.assert_allclose(np.asarray(got, np.float32), reference(case), rtol=1e-2, atol=1e-2)


def test_as_many_splits_as_fill_the_chip_when_none_are_named():
    check(make_case((150, 0), 1))


@pytest.mark.parametrize("wrong", ["limit", "start", "mask", "table", "scale"])
def test_the_comparison_notices_what_is_wrong(wrong):
    case = make_case((7, 4, 8), 8, nodes=(8, 8, 8))
    q, pages, tables, limits, starts, masks = case
    pages = np.where(np.isnan(pages), pages.dtype.type(tpu.GARBAGE), pages)
    if wrong == "limit":
        limits = limits + 1
    elif wrong == "start":
        starts = starts + 1
    elif wrong == "mask":
        masks = masks & ~(masks >> 3)
    elif wrong == "scale":
        q = q * q.dtype.type(2)
    else:
        tables = np.roll(tables, 1, axis=0)
    got = attend_with(INTERPRET, num_splits=1)(*map(jnp.asarray, (q, pages, tables, limits, starts, masks)))
    assert np.abs(np.asarray(got, np.float32) - reference(case)).max() > 0.1


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="seen in the interpreter only")
def test_copies_and_warpgroups_do_not_race():
    check(make_case((100, 3), 3, nodes=(1, 3)), interpret=FIND_RACES, num_splits=1, value_parts=2)
    check(make_case((150, 3), 3), interpret=FIND_RACES, num_splits=2)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": np.float32}, "float32, not bfloat16"),
        ({"page": 4}, "pages of 4 rows"),
        ({"value_width": 96}, "values are 96 wide"),
    ],
)
def test_shapes_that_the_kernel_cannot_serve_are_refused_by_name(options, message):
    value_width = options.pop("value_width", VALUE)
    case = map(jnp.asarray, make_case((9, 3), 1, **options))
    with pytest.raises(ValueError, match=message):
        mla_attention(*case, value_width=value_width, scale=SCALE, implementation="pallas_gpu")


@pytest.mark.skipif(HAS_GPU, reason="runs there")
def test_the_named_kernel_does_not_become_another_where_there_is_no_gpu():
    case = map(jnp.asarray, make_case((9, 3), 1))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        mla_attention(*case, value_width=VALUE, scale=SCALE, implementation="pallas_gpu")
