"""The TPU kernels of the expert MLP equal `reference`, in interpret mode: their arithmetic, not their speed."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import dequantise_blocks, grouped_mlp, quantise_blocks
from kernels_pallas.grouped_matmul.arg_specs import arg_specs
from kernels_pallas.grouped_matmul.pallas_tpu import choose_tile_rows, grouped_mlp_pallas_tpu, locate_step
from tests.kernels.test_grouped_mlp import make_case
from tests.quick import quick_jit

TOKENS, EXPERTS, CHOSEN, WIDTH, FFN, ROWS = 20, 4, 2, 128, 256, 16
"""More tokens than rows of a tile, so that an expert may need two."""
run_tpu = cache(lambda **options: quick_jit(partial(grouped_mlp_pallas_tpu, interpret=True, **options)))
run_reference = quick_jit(partial(grouped_mlp, implementation="reference"))


def poison(case):
    """NaN in the weights of experts that nobody chose."""
    x, ids, weights, *experts = case
    is_chosen = np.isin(np.arange(len(experts[0])), ids)[:, None, None]
    return (x, ids, weights, *(np.where(is_chosen, matrix, np.float32(np.nan)) for matrix in experts))


def quantise(case):
    (gate_up, gate_up_scale), (down, down_scale) = map(quick_jit(quantise_blocks), case[3:])
    return (*case[:3], gate_up, down, gate_up_scale, down_scale)


def check(case, given=None, **options):
    got, expected = run_tpu(**options)(*(case if given is None else given)), np.asarray(run_reference(*case))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


SPECS = {
    spec.name: spec
    for spec in arg_specs("tiny")
    if (spec.work, spec.expert_parallel) in (("decode4", 4), ("decode64", 1))
}
"""Few tokens on few experts, and tiles that are padded: each costs seconds to compile."""


@pytest.mark.parametrize("name", SPECS)
def test_equals_reference_over_the_tiny_arg_specs(name):
    x, ids, _, gate_up, down, *_ = SPECS[name].args
    case = make_case(x.shape[0], gate_up.shape[0], ids.shape[1], 0, x.shape[1], down.shape[1])
    case = quantise(case) if SPECS[name].is_quantised else case
    assert [a.shape for a in case] == [arg.shape for arg in SPECS[name].args if arg is not None]
    check(case)


ROUTINGS = st.one_of(
    st.sampled_from([[(0, 1)] * TOKENS, [(3, 2)] * TOKENS, [(EXPERTS, EXPERTS)] * TOKENS]),
    st.lists(st.sampled_from([(0, 1), (1, 3), (3, 0), (2, EXPERTS)]), min_size=TOKENS, max_size=TOKENS),
    st.integers(0, TOKENS - 1).map(lambda t: [(2, 1) if i == t else (EXPERTS, EXPERTS) for i in range(TOKENS)]),
)
"""All tokens at two experts, nobody at any, everywhere, one token alone; experts without tokens in most."""


@settings(max_examples=25)
@given(ROUTINGS, st.sampled_from([1, 2]))
def test_any_routing_and_nobody_reads_an_expert_without_tokens(routing, cores):
    x, _, *others = make_case(TOKENS, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN)
    case = (x, jnp.asarray(routing, jnp.int32), *others)
    given = poison(case) if any(ids[0] < EXPERTS for ids in routing) else case
    check(case, given, tile_rows=ROWS, num_cores=cores)


def test_one_token():
    case = make_case(1, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN)
    check(case, poison(case))


def test_bfloat16_accumulates_in_float32():
    x, ids, weights, *experts = make_case(TOKENS, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN)
    x, *experts = (a.astype(jnp.bfloat16) for a in (x, *experts))
    got = run_tpu(tile_rows=ROWS)(x, ids, weights, *experts)
    exact = run_reference(x.astype(jnp.float32), ids, weights, *(a.astype(jnp.float32) for a in experts))
    assert got.dtype == jnp.bfloat16
    # Hidden rows, outputs of experts and the sum are rounded: three times 2^-9 of the largest.
    assert np.abs(got.astype(jnp.float32) - exact).max() < 3 * 2**-9 * np.abs(exact).max()


@pytest.mark.parametrize("wrong", ["expert", "weight", "scale"])
def test_the_comparison_notices_what_is_wrong(wrong):
    x, ids, weights, *experts = case = quantise(make_case(TOKENS, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN))
    if wrong == "expert":
        ids = (ids + 1) % EXPERTS
    elif wrong == "weight":
        weights = np.asarray(weights)[::-1]
    else:
        experts[2] = np.asarray(experts[2])[:, :, ::-1]
    got = run_tpu(tile_rows=ROWS)(x, ids, weights, *experts)
    assert np.abs(got - run_reference(*case)).max() > 0.01


@pytest.mark.parametrize("tiles_of_experts", [(1, 1, 1), (3, 1, 2), (5,)])
def test_every_block_of_an_expert_is_named_in_one_run_of_steps_and_every_tile_meets_it(tiles_of_experts):
    """The pipeline fetches a block when its name changes: once each."""
    num_blocks, fetched, met, tile = 4, [], set(), 0
    for expert, count in enumerate(tiles_of_experts):
        first = tile
        for tile in range(first, first + count):
            for index in range(num_blocks):
                at, block = (int(v) for v in locate_step(jnp.int32(tile), index, num_blocks, first, jnp.int32(count)))
                met.add((at, block))
                if not fetched or fetched[-1] != (expert, block):
                    fetched.append((expert, block))
        tile = first + count
    assert fetched == [(e, b) for e in range(len(tiles_of_experts)) for b in range(num_blocks)]
    assert len(met) == sum(tiles_of_experts) * num_blocks


def test_quantising_is_within_half_a_step_of_float8_block_by_block():
    weights = np.random.default_rng(0).normal(size=(2, 200, 300)).astype(np.float32)
    weights[0, :128, :128] = 0
    weights[1, 130:] *= 1e3
    values, scale = quick_jit(quantise_blocks)(weights)
    assert values.dtype == jnp.float8_e4m3fn and scale.shape == (2, 2, 3) and scale[0, 0, 0] == 1
    error = np.abs(quick_jit(lambda *a: dequantise_blocks(*a, jnp.float32))(values, scale) - weights)
    # Three bits of mantissa: 2^-4 of the value; below 2^-6 the steps are 2^-9.
    spread = np.repeat(np.repeat(scale, 128, 1)[:, :200], 128, 2)[:, :, :300]
    assert (error <= np.maximum(2**-4 * np.abs(weights), 2**-10 * spread) * 1.0001).all()


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "rows"), [(1, 8, 24, 16), (64, 8, 384, 16), (64, 6, 64, 16), (512, 6, 64, 128)]
)
def test_rows_of_a_tile_hold_twice_an_even_share(tokens, chosen, experts, rows):
    assert choose_tile_rows(tokens, chosen, experts) == rows


def test_what_the_kernels_cannot_serve_is_refused_by_name():
    run = partial(grouped_mlp, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="an expert is 96 wide"):
        run(*make_case(4, EXPERTS, CHOSEN, model=WIDTH, ffn=96))
    x, *others = make_case(4, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN)
    with pytest.raises(ValueError, match="experts are float32, not bfloat16"):
        run(x.astype(jnp.bfloat16), *others)
    with pytest.raises(ValueError, match="both matrices or of neither"):
        run(x, *others, jnp.ones((EXPERTS, 1, 4)))


def test_a_gradient_is_refused_by_name():
    x, *others = make_case(4, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN)
    with pytest.raises(ValueError, match="pallas_tpu has no gradient; name implementation='xla'"):
        jax.grad(lambda x: grouped_mlp_pallas_tpu(x, *others, interpret=True).sum())(x)
    quantised = quantise((x, *others))
    with pytest.raises(ValueError, match="quantised experts have no gradient"):
        jax.grad(lambda x: grouped_mlp(x, *quantised[1:], implementation="xla").sum())(x)


def test_the_named_kernel_does_not_become_another_where_there_is_no_tpu():
    if jax.default_backend() == "tpu":
        pytest.skip("runs there")
    with pytest.raises(ValueError, match=r"(?i)tpu|interpret"):
        grouped_mlp(*make_case(4, EXPERTS, CHOSEN, model=WIDTH, ffn=FFN), implementation="pallas_tpu")
