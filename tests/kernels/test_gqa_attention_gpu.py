"""The GPU kernel of paged grouped-query attention equals `reference`, in interpret mode: arithmetic, not speed.

The kernel is that of `mla_attention`; what is new are several KV heads in a row, and values behind their keys.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas._paged.mask import MASK_BITS
from kernels_pallas.gqa_attention import gqa_attention
from kernels_pallas.gqa_attention.pallas_gpu import gqa_attention_pallas_gpu
from tests.kernels import test_gqa_attention_tpu as tpu
from tests.kernels.gpu_interpreter import HAS_GPU, INTERPRET
from tests.quick import quick_jit

HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES, SCALE = 6, 2, 64, 16, 10, 0.15
CONTEXT = PAGE * PAGES
pytestmark = pytest.mark.usefixtures("gpu_interpreter")


def make_case(lengths, tokens, *, head_dim=HEAD_DIM, page=PAGE, dtype=jnp.bfloat16, **options):
    """As for the TPU kernel: large numbers in slots that nobody may see, NaN in pages that nobody may fetch."""
    shape = (HEADS, KV_HEADS, head_dim, page, CONTEXT // page)
    return tpu.make_case(lengths, tokens, dtype=dtype, shape=shape, **options)


@cache
def attend_with(**options):
    return quick_jit(
        lambda *arrays: gqa_attention_pallas_gpu(
            *arrays, *(None,) * (6 - len(arrays)), scale=SCALE, interpret=INTERPRET, **options
        )
    )


def reference(case):
    """What `reference` says in float32."""
    q, pages, *others = case
    return tpu.reference([q.astype(np.float32), pages.astype(np.float32), *others], SCALE)


def check(case, **options):
    got = attend_with(**options)(*map(jnp.asarray, case))
    assert got.dtype == jnp.bfloat16
    got = np.asarray(got, np.float32)
    # Weights and results are rounded to bfloat16.
    np.testing.assert_allclose(got, reference(case), rtol=1e-2, atol=1e-2)
    assert not got[case[3] == 0].any()


LENGTHS = st.sampled_from([0, 1, PAGE - 1, PAGE, 63, 64, 65, 4 * PAGE + 1, CONTEXT - 1, CONTEXT])


@settings(max_examples=6, deadline=None)
@given(st.lists(LENGTHS, min_size=2, max_size=2), st.sampled_from([1, 3]), st.integers(0, 9))
def test_ragged_contexts(lengths, num_splits, seed):
    check(make_case(lengths, 2, seed=seed), num_splits=num_splits)


TREE_LENGTHS = st.integers(1, CONTEXT - MASK_BITS)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(TREE_LENGTHS, st.sampled_from([0, 1, 2, 33])), min_size=2, max_size=2), st.integers(0, 9))
def test_trees_from_one_node_to_as_many_as_a_mask_can_name(requests, seed):
    """33 tokens of three heads are two blocks of rows."""
    lengths, nodes = zip(*requests, strict=True)
    check(make_case(lengths, 33, nodes=nodes, seed=seed), num_splits=1)


@pytest.mark.parametrize("head_dim", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_wider_heads(head_dim):
    check(make_case((100, 7), 2, head_dim=head_dim), num_splits=1)


@pytest.mark.parametrize("wrong", ["limit", "start", "mask", "table", "heads"])
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
    elif wrong == "table":
        tables = np.roll(tables, 1, axis=0)
    else:
        q = np.roll(q, 1, axis=2)
    got = attend_with(num_splits=1)(*map(jnp.asarray, (q, pages, tables, limits, starts, masks)))
    assert np.abs(np.asarray(got, np.float32) - reference(case)).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": np.float32}, "float32, not bfloat16"),
        ({"page": 4}, "pages of 4 rows"),
        ({"head_dim": 96}, "keys are 96 wide"),
        ({"head_dim": 320}, "heads are 320 wide"),
    ],
)
def test_shapes_that_the_kernel_cannot_serve_are_refused_by_name(options, message):
    case = map(jnp.asarray, make_case((9, 3), 1, **options))
    with pytest.raises(ValueError, match=message):
        gqa_attention(*case, scale=SCALE, implementation="pallas_gpu")


@pytest.mark.skipif(HAS_GPU, reason="runs there")
def test_the_named_kernel_does_not_become_another_where_there_is_no_gpu():
    case = map(jnp.asarray, make_case((9, 3), 1))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        gqa_attention(*case, scale=SCALE, implementation="pallas_gpu")
