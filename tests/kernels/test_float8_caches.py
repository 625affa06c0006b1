"""Attention over float8 caches equals float32 attention over the very values that they hold, in every implementation.

Kernels run in interpret mode: their arithmetic, not their speed.
"""

from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # Where it says whether it saw a race.

from kernels_pallas.gqa_attention.api import IMPLEMENTATIONS as GQA
from kernels_pallas.mla_attention import MASK_BITS, mla_attention
from kernels_pallas.mla_attention.api import IMPLEMENTATIONS as MLA
from tests.kernels import test_gqa_attention_tpu as gqa
from tests.kernels import test_mla_attention_tpu as mla
from tests.kernels.gpu_interpreter import FIND_RACES, HAS_GPU, INTERPRET
from tests.quick import quick_jit

FLOAT8, LARGEST = jnp.float8_e4m3fn, 448
PAGE, PAGES, SCALE = 32, 5, 0.1
CONTEXT = PAGE * PAGES
VALUE = 128
pytestmark = pytest.mark.usefixtures("gpu_interpreter")

TABLES = {"mla": (MLA, {"value_width": VALUE, "scale": SCALE}), "gqa": (GQA, {"scale": SCALE})}
OPTIONS = {
    "reference": {},
    "xla": {},
    "pallas_tpu": {"interpret": True, "block_tokens": 2 * PAGE},
    "pallas_gpu": {"interpret": INTERPRET, "num_splits": 2},
}


def make_case(operation, implementation, lengths, tokens, dtype, **options):
    """As for the TPU kernel: large numbers in slots that nobody may see, NaN in pages that nobody may fetch.

    Returns:
        The arrays with a float8 cache, and the cache before that was rounded.
    """
    if operation == "mla":
        shape = (4, 192, 256 if implementation == "pallas_tpu" else 192, PAGE, PAGES)
        q, pages, *others = mla.make_case(lengths, tokens, shape=shape, **options)
    else:
        q, pages, *others = gqa.make_case(lengths, tokens, shape=(6, 2, 64, PAGE, PAGES), **options)
    if not implementation.startswith("pallas"):
        pages = np.nan_to_num(pages)
    return [q.astype(dtype), np.clip(pages, -LARGEST, LARGEST).astype(FLOAT8), *others], pages


@cache
def _jit(operation, implementation, **options):
    functions, static = TABLES[operation]
    return quick_jit(partial(functions[implementation], **static, **(OPTIONS[implementation] | options)))


def attend(operation, implementation, case, **options):
    case = [*case, *(None,) * (6 - len(case))]
    return _jit(operation, implementation, **options)(
        *(None if array is None else jnp.asarray(array) for array in case)
    )


def in_float32(operation, case):
    """What `reference` says of the values of a float8 cache."""
    q, pages, *others = case
    case = [q.astype(np.float32), np.nan_to_num(pages.astype(np.float32)), *others]
    return np.asarray(attend(operation, "reference", case))


def check(operation, implementation, case, **options):
    got = attend(operation, implementation, case, **options)
    assert got.dtype == case[0].dtype
    got = np.asarray(got, np.float32)
    # Weights and results are rounded to bfloat16 where queries are.
    tolerance = 3e-6 if case[0].dtype == np.float32 else 1e-2
    np.testing.assert_allclose(got, in_float32(operation, case), rtol=tolerance, atol=tolerance)
    assert not got[case[3] == 0].any()


TYPES = {"reference": ("float32",), "pallas_gpu": ("bfloat16",)}
CALLS = [
    (operation, implementation, dtype)
    for operation in TABLES
    for implementation in OPTIONS
    for dtype in TYPES.get(implementation, ("float32", "bfloat16"))
]


@pytest.mark.parametrize(("operation", "implementation", "dtype"), CALLS)
@pytest.mark.parametrize("nodes", [None, (2, 8, 0)], ids=["slices", "trees"])
def test_equals_float32_attention_over_the_values_of_the_cache(operation, implementation, dtype, nodes):
    tokens = 3 if nodes is None else 8
    case, _ = make_case(operation, implementation, (100, 7, 0), tokens, np.dtype(dtype), nodes=nodes)
    check(operation, implementation, case)


@pytest.mark.parametrize("operation", TABLES)
def test_the_comparison_notices_values_that_were_not_rounded(operation):
    case, pages = make_case(operation, "xla", (100, 7, 0), 3, np.float32)
    got = np.asarray(attend(operation, "xla", [case[0], pages, *case[2:]]))
    assert np.abs(got - in_float32(operation, case)).max() > 1e-3


LENGTHS = st.sampled_from([0, 1, PAGE - 1, PAGE, 63, 64, 65, CONTEXT - 1, CONTEXT])


@settings(max_examples=4, deadline=None)
@given(st.lists(LENGTHS, min_size=2, max_size=2), st.integers(0, 9))
def test_ragged_contexts_on_gpu(lengths, seed):
    """Its kernel has work of its own to do for float8; on TPU a block is cast where it is multiplied."""
    case, _ = make_case("mla", "pallas_gpu", lengths, 2, jnp.bfloat16, seed=seed)
    check("mla", "pallas_gpu", case)


@pytest.mark.parametrize("value_parts", [1, 2])
def test_warpgroups_that_share_a_block_in_bfloat16(value_parts):
    case, _ = make_case("mla", "pallas_gpu", (CONTEXT - MASK_BITS, 20), 3, jnp.bfloat16, nodes=(2, 3))
    check("mla", "pallas_gpu", case, value_parts=value_parts)


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="seen in the interpreter only")
def test_copies_and_warpgroups_do_not_race():
    case, _ = make_case("mla", "pallas_gpu", (CONTEXT, 3), 3, jnp.bfloat16)
    check("mla", "pallas_gpu", case, interpret=FIND_RACES, value_parts=2)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("specs", [mla.arg_specs, gqa.arg_specs])
def test_calls_with_float8_caches_have_names_of_their_own(specs):
    model = "moonlight" if specs is mla.arg_specs else "qwen2_72b"
    of = {spec.name: spec.args[1].dtype for spec in specs(model)}
    assert len(of) == len(list(specs(model)))
    assert {name.endswith("-fp8") for name, dtype in of.items() if dtype == FLOAT8} == {True}


def test_pages_that_do_not_fill_registers_are_refused_by_name_on_tpu():
    shape = (4, 192, 256, 16, PAGES)
    q, pages, *others = mla.make_case((9, 3), 1, dtype=jnp.bfloat16, shape=shape)
    case = map(jnp.asarray, (q, pages.astype(FLOAT8), *others))
    with pytest.raises(ValueError, match="pages of 16 float8_e4m3fn rows are no multiple of 32"):
        mla_attention(*case, value_width=VALUE, scale=SCALE, implementation="pallas_tpu")
