"""The TPU kernel of paged latent attention equals `reference`, in interpret mode: its arithmetic, not its speed."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # Where the simulator says whether it saw a race.
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._paged import sizes
from kernels_pallas.mla_attention import MASK_BITS, mla_attention
from kernels_pallas.mla_attention.arg_specs import arg_specs
from kernels_pallas.mla_attention.pallas_tpu import mla_attention_pallas_tpu
from tests.quick import quick_jit

HEADS, WIDTH, ROW_WIDTH, VALUE, PAGE, PAGES, SCALE = 4, 80, 128, 64, 8, 5, 0.2
CONTEXT = PAGE * PAGES
GARBAGE = 1e4
"""In every slot that nobody may see; NaN in every page that nobody may fetch."""


def make_case(lengths, tokens, *, nodes=None, seed=0, dtype=np.float32, shape=(HEADS, WIDTH, ROW_WIDTH, PAGE, PAGES)):
    """Requests with contexts of these lengths.

    Without `nodes` the rows are the last tokens of each; with it each context ends where a random tree of so many nodes
    starts, whose nodes lie in any of the `MASK_BITS` slots from there.
    """
    heads, width, row_width, page, pages = shape
    rng = np.random.default_rng(seed)
    tiles, row = len(lengths), np.arange(tokens)
    lengths = np.array(lengths)[:, None]
    starts = masks = None
    if nodes is None:
        count = np.minimum(lengths, tokens)
        limits = np.where(row < count, lengths - count + row + 1, 0)
        ends = lengths[:, 0]
    else:
        nodes = np.array(nodes)[:, None]
        limits = np.where(row < nodes, np.maximum(lengths, 1), 0)
        starts = np.maximum(lengths[:, 0], 1)
        masks = np.zeros((tiles, tokens), np.uint32)
        for n in range(tiles):
            # Row 0 is the newest token, whose slot is below the limit; the others hang below it.
            places = rng.permutation(MASK_BITS)
            for t in range(1, nodes[n, 0]):
                masks[n, t] = masks[n, rng.integers(t)] | np.uint32(1 << int(places[t - 1]))
        top = np.array([max(int(mask).bit_length() for mask in masks[n]) for n in range(tiles)])
        ends = np.where(nodes[:, 0] > 0, starts + top, 0)
    cache = np.full((tiles * pages + 1, page, row_width), np.nan)
    tables = rng.permutation(np.arange(1, len(cache))).reshape(tiles, pages)
    for n in range(tiles):
        used = -(-ends[n] // page)
        rows = np.full((used * page, row_width), GARBAGE)
        rows[: ends[n], :width] = rng.normal(size=(ends[n], width))
        cache[tables[n, :used]] = rows.reshape(used, page, row_width)
    q = rng.normal(size=(tiles, tokens, heads, width))
    case = [q.astype(dtype), cache.astype(dtype), tables.astype(np.int32), limits.astype(np.int32)]
    return case if nodes is None else [*case, starts.astype(np.int32), masks]


@cache
def attend_with(interpret, value_width=VALUE, scale=SCALE, **options):
    if interpret is None:
        return quick_jit(
            lambda *arrays: mla_attention(*arrays, value_width=value_width, scale=scale, implementation="reference")
        )
    return quick_jit(
        lambda *arrays: mla_attention_pallas_tpu(
            *arrays, *(None,) * (6 - len(arrays)), value_width=value_width, scale=scale, interpret=interpret, **options
        )
    )


def reference(case, **options):
    """What `reference` says of a clean cache: it multiplies garbage by zero, and NaN would show."""
    q, cache, *others = case
    return np.asarray(
        attend_with(None, **options)(q, np.where(np.isnan(cache), cache.dtype.type(0), cache), *others), np.float32
    )


def check(case, atol=3e-6, interpret=True, **options):
    got = np.asarray(attend_with(interpret, **options)(*case), np.float32)
    static = {key: options[key] for key in ("value_width", "scale") if key in options}
    np.testing.assert_allclose(got, reference(case, **static), rtol=1e-6, atol=atol)
    assert not got[case[3] == 0].any()


SPECS = {spec.name: spec for spec in arg_specs("tiny")}


@pytest.mark.parametrize("name", SPECS)
def test_equals_reference_over_the_tiny_arg_specs(name):
    spec = SPECS[name]
    q, cache, tables, *_, mask = spec.args
    tiles, tokens, heads, width = q.shape
    _, page, row_width = cache.shape
    context = tables.shape[1] * page
    lengths = np.linspace(tokens, context - MASK_BITS, tiles).astype(int)
    nodes = None if mask is None else [tokens] * tiles
    case = make_case(lengths, tokens, nodes=nodes, shape=(heads, width, row_width, page, tables.shape[1]))
    assert [array.shape for array in case if array.ndim != 3] == [
        arg.shape for arg in spec.args if arg is not None and arg.ndim != 3
    ]
    check(case, block_tokens=2 * page, value_width=spec.value_width, scale=spec.scale)


LENGTHS = st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 3, CONTEXT - 1, CONTEXT])
CORES = st.sampled_from([{"num_cores": 2}, {"num_cores": 2, "num_splits": 1}])


@settings(max_examples=25)
@given(st.lists(LENGTHS, min_size=3, max_size=3), CORES, st.integers(0, 9))
def test_ragged_contexts(lengths, cores, seed):
    check(make_case(lengths, 2, seed=seed), block_tokens=2 * PAGE, **cores)


TREE_LENGTHS = st.integers(1, CONTEXT - MASK_BITS)


@settings(max_examples=20)
@given(st.lists(st.tuples(TREE_LENGTHS, st.sampled_from([0, 1, 2, 20, 33])), min_size=3, max_size=3), st.integers(0, 9))
def test_trees_from_one_node_to_as_many_as_a_mask_can_name(requests, seed):
    lengths, nodes = zip(*requests, strict=True)
    check(make_case(lengths, 33, nodes=nodes, seed=seed), block_tokens=2 * PAGE)


@pytest.mark.slow  # Finding races runs cores as threads, and has crashed the process of a long session.
@pytest.mark.parametrize("cores", [1, 2])
def test_copies_and_computation_do_not_race_and_unwritten_memory_does_not_show(cores):
    """Simulated copies happen when they are waited for, in memory that is NaN before."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    case = make_case((0, 3, 0, 8, 0), 3, nodes=(0, 3, 0, 2, 0))
    try:
        check(case, interpret=params, block_tokens=PAGE, num_cores=cores)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_tiles_of_many_rows_are_cut(monkeypatch):
    monkeypatch.setattr(sizes, "MAX_ROWS", 16)
    case = make_case((7, 0, 5), 4, nodes=(4, 0, 3))
    check(case, block_tokens=4 * PAGE)


def test_bfloat16_accumulates_in_float32():
    case = make_case((70, 13), 1, dtype=jnp.bfloat16, shape=(HEADS, WIDTH, ROW_WIDTH, 16, PAGES))
    assert attend_with(True, block_tokens=16)(*case).dtype == jnp.bfloat16
    check(case, atol=0.02, block_tokens=16)


def test_queries_of_another_type_than_the_cache():
    case = make_case((70, 13), 1, dtype=jnp.bfloat16, shape=(HEADS, WIDTH, ROW_WIDTH, 16, PAGES))
    case[0] = case[0].astype(np.float32)
    assert attend_with(True, block_tokens=32)(*case).dtype == jnp.float32
    check(case, block_tokens=32)


@pytest.mark.parametrize("wrong", ["limit", "start", "mask", "table"])
def test_the_comparison_notices_what_is_wrong(wrong):
    case = make_case((7, 4, 8), 8, nodes=(8, 8, 8))
    q, cache, tables, limits, starts, masks = case
    cache = np.where(np.isnan(cache), np.float32(GARBAGE), cache)
    if wrong == "limit":
        limits = limits + 1
    elif wrong == "start":
        starts = starts + 1
    elif wrong == "mask":
        masks = masks & ~(masks >> 3)
    else:
        tables = np.roll(tables, 1, axis=0)
    got = attend_with(True, block_tokens=2 * PAGE)(q, cache, tables, limits, starts, masks)
    assert np.abs(got - reference(case)).max() > 0.1


def test_a_tile_keeps_its_bits_among_others_and_at_another_place():
    case = make_case((40, 5, 16), 4)
    attend = attend_with(True, block_tokens=2 * PAGE)
    out = np.asarray(attend(*case))
    q, cache, tables, limits = case
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(attend(q[order], cache, tables[order], limits[order]), out[order])
    alone = np.where(np.arange(3)[:, None] == 0, limits, 0)
    np.testing.assert_array_equal(attend(q, cache, tables, alone)[0], out[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_of_cache_rows_is_ignored(implementation):
    q, cache, *others = make_case((7, 4, 8), 8, nodes=(8, 8, 8))
    padded = np.where(np.isnan(cache), cache.dtype.type(0), cache)
    padded[:, :, WIDTH:] = np.nan
    got = [
        quick_jit(lambda *a: mla_attention(*a, value_width=VALUE, scale=SCALE, implementation=implementation))(
            q, rows, *others
        )
        for rows in (padded, np.ascontiguousarray(padded[:, :, :WIDTH]))
    ]
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((HEADS, WIDTH, WIDTH, PAGE, PAGES), np.float32, "80 wide"),
        ((HEADS, WIDTH, ROW_WIDTH, 4, PAGES), np.float32, "pages of 4 float32 rows"),
        ((HEADS, WIDTH, ROW_WIDTH, 8, PAGES), jnp.bfloat16, "pages of 8 bfloat16 rows"),
        ((HEADS, WIDTH, ROW_WIDTH, PAGE, PAGES), np.float16, "float16"),
    ],
)
def test_shapes_that_the_kernel_cannot_serve_are_refused_by_name(shape, dtype, message):
    case = make_case((9, 3), 1, dtype=dtype, shape=shape)
    with pytest.raises(ValueError, match=message):
        mla_attention(*map(jnp.asarray, case), value_width=VALUE, scale=SCALE, implementation="pallas_tpu")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="runs there")
def test_the_named_kernel_does_not_become_another_where_there_is_no_tpu():
    case = make_case((9, 3), 1)
    with pytest.raises(ValueError, match=r"(?i)tpu|interpret"):
        mla_attention(*map(jnp.asarray, case), value_width=VALUE, scale=SCALE, implementation="pallas_tpu")
