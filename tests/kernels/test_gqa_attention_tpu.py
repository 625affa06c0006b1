"""The TPU kernel of paged grouped-query attention equals `reference`, in interpret mode: arithmetic, not speed.

The kernel is that of `mla_attention`; what is new are several KV heads in a row, and values behind their keys.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # Where the simulator says whether it saw a race.
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._paged import sizes
from kernels_pallas._paged.mask import MASK_BITS
from kernels_pallas.gqa_attention import gqa_attention
from kernels_pallas.gqa_attention.arg_specs import arg_specs
from kernels_pallas.gqa_attention.pallas_tpu import gqa_attention_pallas_tpu
from tests.kernels.test_mla_attention_tpu import GARBAGE
from tests.kernels.test_mla_attention_tpu import make_case as make_paged_case
from tests.quick import quick_jit

HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES, SCALE = 6, 2, 128, 8, 5, 0.1
CONTEXT = PAGE * PAGES


def make_case(lengths, tokens, *, shape=(HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES), **options):
    """As for latent attention: garbage in every slot that nobody may see, NaN in every page that nobody may fetch."""
    heads, kv_heads, head_dim, page, pages = shape
    row_width = 2 * kv_heads * head_dim
    q, *others = make_paged_case(lengths, tokens, shape=(heads, row_width, row_width, page, pages), **options)
    return [np.ascontiguousarray(q[..., :head_dim]), *others]


@cache
def compile_kernel(interpret, scale, **options):
    return quick_jit(
        lambda *arrays: gqa_attention_pallas_tpu(
            *arrays, *(None,) * (6 - len(arrays)), scale=scale, interpret=interpret, **options
        )
    )


@cache
def compile_reference(scale):
    return quick_jit(lambda *arrays: gqa_attention(*arrays, scale=scale, implementation="reference"))


def attend(case, interpret=True, scale=SCALE, **options):
    return compile_kernel(interpret, scale, **options)(*case)


def reference(case, scale=SCALE):
    """What `reference` says of a clean cache: it multiplies garbage by zero, and NaN would show."""
    q, cache, *others = case
    clean = np.where(np.isnan(cache), cache.dtype.type(0), cache)
    return np.asarray(compile_reference(scale)(q, clean, *others), np.float32)


def check(case, atol=3e-6, scale=SCALE, **options):
    got = attend(case, scale=scale, **options)
    assert got.dtype == case[0].dtype
    np.testing.assert_allclose(np.asarray(got, np.float32), reference(case, scale), rtol=1e-6, atol=atol)
    assert not np.asarray(got)[case[3] == 0].any()


SPECS = {spec.name: spec for spec in arg_specs("tiny")}


@pytest.mark.parametrize("name", SPECS)
def test_equals_reference_over_the_tiny_arg_specs(name):
    """Their heads of 64 share registers: a key and its value are one."""
    spec = SPECS[name]
    q, cache, tables, *_, mask = spec.args
    tiles, tokens, heads, head_dim = q.shape
    page, pages = cache.shape[1], tables.shape[1]
    lengths = np.linspace(tokens, page * pages - MASK_BITS, tiles).astype(int)
    shape = (heads, cache.shape[2] // (2 * head_dim), head_dim, page, pages)
    case = make_case(lengths, tokens, nodes=None if mask is None else [tokens] * tiles, shape=shape)
    assert [array.shape for array in case if array.ndim != 3] == [
        arg.shape for arg in spec.args if arg is not None and arg.ndim != 3
    ]
    check(case, block_tokens=2 * page, scale=spec.scale)


LENGTHS = st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 3, CONTEXT - 1, CONTEXT])


@settings(max_examples=12)
@given(st.lists(LENGTHS, min_size=3, max_size=3), st.integers(0, 9))
def test_ragged_contexts(lengths, seed):
    check(make_case(lengths, 2, seed=seed), block_tokens=2 * PAGE, num_cores=2)


TREE_LENGTHS = st.integers(1, CONTEXT - MASK_BITS)


@settings(max_examples=12)
@given(st.lists(st.tuples(TREE_LENGTHS, st.sampled_from([0, 1, 2, 8])), min_size=3, max_size=3), st.integers(0, 9))
def test_trees_from_one_node_to_the_deepest_bit(requests, seed):
    lengths, nodes = zip(*requests, strict=True)
    check(make_case(lengths, 8, nodes=nodes, seed=seed), block_tokens=2 * PAGE)


@pytest.mark.parametrize("wrong", ["causal", "start", "mask", "table", "heads"])
def test_the_comparison_notices_what_is_wrong(wrong):
    case = make_case((7, 4, 8), 8, nodes=(8, 8, 8))
    q, cache, tables, limits, starts, masks = case
    cache = np.where(np.isnan(cache), np.float32(GARBAGE), cache)
    if wrong == "causal":
        limits, masks = limits + np.arange(8, dtype=np.int32), np.zeros_like(masks)
    elif wrong == "start":
        starts = starts + 1
    elif wrong == "mask":
        masks = masks & ~(masks >> 3)
    elif wrong == "table":
        tables = np.roll(tables, 1, axis=0)
    else:
        q = np.roll(q, 1, axis=2)
    got = attend([q, cache, tables, limits, starts, masks], block_tokens=2 * PAGE)
    assert np.abs(got - reference(case)).max() > 0.1


def test_tiles_that_need_too_much_memory_are_cut(monkeypatch):
    case = make_case((7, 4, 8), 8, nodes=(8, 3, 0))
    whole = np.asarray(attend(case, block_tokens=2 * PAGE))
    monkeypatch.setattr(sizes, "MAX_ROWS", 16)
    np.testing.assert_array_equal(attend(case, block_tokens=2 * PAGE, num_splits=1), whole)


def test_bfloat16_accumulates_in_float32():
    case = make_case((70, 13), 1, dtype=jnp.bfloat16, shape=(HEADS, KV_HEADS, HEAD_DIM, 16, PAGES))
    check(case, atol=0.03, block_tokens=16)


@pytest.mark.slow  # Finding races runs cores as threads, and has crashed the process of a long session.
def test_copies_and_computation_do_not_race_and_unwritten_memory_does_not_show():
    """Simulated copies happen when they are waited for, in memory that is NaN before."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    case = make_case((0, 3, 0, 8, 0), 3, nodes=(0, 3, 0, 2, 0))
    try:
        check(case, interpret=params, block_tokens=PAGE, num_cores=2)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((HEADS, KV_HEADS, 32, PAGE, PAGES), np.float32, "key and value are 64 wide"),
        ((HEADS, KV_HEADS, HEAD_DIM, 4, PAGES), np.float32, "pages of 4 float32 rows"),
        ((HEADS, KV_HEADS, HEAD_DIM, 8, PAGES), jnp.bfloat16, "pages of 8 bfloat16 rows"),
        ((HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES), np.float16, "float16"),
    ],
)
def test_shapes_that_the_kernel_cannot_serve_are_refused_by_name(shape, dtype, message):
    case = make_case((9, 3), 1, dtype=dtype, shape=shape)
    with pytest.raises(ValueError, match=message):
        gqa_attention(*map(jnp.asarray, case), scale=SCALE, implementation="pallas_tpu")
