"""The GPU kernels of the expert MLP equal `reference`, in interpret mode: their arithmetic, not their speed."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # Where it says whether it saw a race.

from kernels_pallas.grouped_matmul import grouped_mlp, quantise_blocks
from kernels_pallas.grouped_matmul.pallas_gpu import grouped_mlp_pallas_gpu
from tests.kernels.gpu_interpreter import FIND_RACES, HAS_GPU, INTERPRET
from tests.kernels.test_grouped_mlp import make_case
from tests.quick import quick_jit

TOKENS, EXPERTS, CHOSEN, WIDTH, FFN = 70, 4, 2, 128, 256
"""More tokens than rows of a tile, so that an expert may need two."""
pytestmark = pytest.mark.usefixtures("gpu_interpreter")
run_gpu = cache(lambda interpret=INTERPRET: quick_jit(partial(grouped_mlp_pallas_gpu, interpret=interpret)))
run_reference = quick_jit(partial(grouped_mlp, implementation="reference"))


def make_gpu_case(tokens=TOKENS, model=WIDTH, ffn=FFN, is_float8=False):
    """Tokens in bfloat16, experts too or in float8 with scales that differ from block to block."""
    x, ids, weights, *experts = make_case(tokens, EXPERTS, CHOSEN, model=model, ffn=ffn)
    if not is_float8:
        return (x.astype(jnp.bfloat16), ids, weights, *(matrix.astype(jnp.bfloat16) for matrix in experts))
    (gate_up, gate_up_scale), (down, down_scale) = map(quantise_blocks, experts)
    # Powers of two between blocks, which a scale of another block, or none, would miss.
    gate_up_scale, down_scale = (
        s * 2.0 ** (jnp.arange(s.size) % 3).reshape(s.shape) for s in (gate_up_scale, down_scale)
    )
    return x.astype(jnp.bfloat16), ids, weights, gate_up, down, gate_up_scale, down_scale


def exact(case):
    """What `reference` says in float32; it multiplies float8 experts by their scales in float32."""
    x, ids, weights, *experts = case
    if len(experts) == 2:
        experts = [matrix.astype(jnp.float32) for matrix in experts]
    return np.asarray(run_reference(x.astype(jnp.float32), ids, weights, *experts))


def check(case, interpret=INTERPRET):
    """Experts that nobody chose hold NaN for the kernels."""
    x, ids, weights, *experts = case
    is_chosen = np.isin(np.arange(EXPERTS), ids)[:, None, None]
    poisoned = [jnp.where(is_chosen, matrix, jnp.asarray(np.nan, matrix.dtype)) for matrix in experts]
    got = run_gpu(interpret)(x, ids, weights, *poisoned)
    expected = exact(case)
    assert got.dtype == jnp.bfloat16
    # Hidden rows, outputs of experts and the sum are rounded, and float8 weights of both products once scaled.
    roundings = 3 if len(experts) == 2 else 5
    assert np.abs(got.astype(jnp.float32) - expected).max() <= roundings * 2**-9 * np.abs(expected).max()


ROUTINGS = st.one_of(
    st.sampled_from([[(0, 1)] * TOKENS, [(3, 2)] * TOKENS, [(EXPERTS, EXPERTS)] * TOKENS]),
    st.lists(st.sampled_from([(0, 1), (1, 3), (3, 0), (2, EXPERTS)]), min_size=TOKENS, max_size=TOKENS),
    st.integers(0, TOKENS - 1).map(lambda t: [(2, 1) if i == t else (EXPERTS, EXPERTS) for i in range(TOKENS)]),
)
"""All tokens at two experts, nobody at any, everywhere, one token alone; experts without tokens in most."""


WEIGHTS = pytest.mark.parametrize("is_float8", [False, True], ids=["bfloat16", "float8"])


@WEIGHTS
@settings(max_examples=6, deadline=None)
@given(ROUTINGS)
def test_any_routing_and_nobody_reads_an_expert_without_tokens(is_float8, routing):
    x, _, *others = make_gpu_case(is_float8=is_float8)
    check((x, jnp.asarray(routing, jnp.int32), *others))


@WEIGHTS
def test_one_token(is_float8):
    check(make_gpu_case(1, is_float8=is_float8))


@WEIGHTS
def test_more_slabs_of_depth_than_are_in_shared_memory_at_a_time(is_float8):
    check(make_gpu_case(5, model=640, ffn=128, is_float8=is_float8))


@pytest.mark.slow
@WEIGHTS
def test_as_many_slabs_of_an_expert_as_moonlight_has(is_float8):
    check(make_gpu_case(5, model=128, ffn=1408, is_float8=is_float8))


@pytest.mark.parametrize("wrong", ["expert", "weight", "up", "gate_up_scale", "down_scale"])
def test_the_comparison_notices_what_is_wrong(wrong):
    x, ids, weights, *experts = case = make_gpu_case(is_float8="scale" in wrong)
    if wrong == "expert":
        ids = (ids + 1) % EXPERTS
    elif wrong == "weight":
        weights = weights[::-1]
    elif wrong == "up":
        experts[0] = jnp.roll(experts[0], FFN, axis=2)
    elif wrong == "gate_up_scale":
        experts[2] = jnp.roll(experts[2], 1, axis=2)
    else:
        experts[3] = jnp.roll(experts[3], 1, axis=1)
    expected = exact(case)
    got = run_gpu()(x, ids, weights, *experts).astype(jnp.float32)
    assert np.abs(got - expected).max() > 0.05 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="seen in the interpreter only")
@WEIGHTS
def test_copies_and_products_do_not_race(is_float8):
    check(make_gpu_case(5, model=640, ffn=128, is_float8=is_float8), FIND_RACES)
    assert not interpret_pallas_call.get_races().races_found


def test_what_the_kernels_cannot_serve_is_refused_by_name():
    run = partial(grouped_mlp, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="an expert is 96 wide"):
        run(*make_gpu_case(4, ffn=96))
    with pytest.raises(ValueError, match="tokens are float32, not bfloat16"):
        run(*make_case(4, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN))
    x, ids, weights, *experts = make_gpu_case(4, is_float8=True)
    with pytest.raises(ValueError, match="experts are float8_e4m3fn, not bfloat16"):
        run(x, ids, weights, *experts[:2])
    with pytest.raises(ValueError, match="experts are bfloat16, not float8_e4m3fn"):
        run(*make_gpu_case(4), *experts[2:])


def test_a_gradient_is_refused_by_name():
    x, *others = make_gpu_case(4)
    with pytest.raises(ValueError, match="pallas_gpu has no gradient; name implementation='xla'"):
        jax.grad(lambda x: grouped_mlp_pallas_gpu(x, *others, interpret=INTERPRET).sum())(x)


@pytest.mark.skipif(HAS_GPU, reason="runs there")
def test_the_named_kernel_does_not_become_another_where_there_is_no_gpu():
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        grouped_mlp(*make_gpu_case(4), implementation="pallas_gpu")
