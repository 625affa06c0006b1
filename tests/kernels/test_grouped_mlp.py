"""The expert MLP is exact for every load of the experts, forward and backward, and keeps each row's bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import dequantise_blocks, grouped_mlp, quantise_blocks
from kernels_pallas.grouped_matmul.xla import grouped_mlp_ragged, grouped_mlp_tiles, plan_tiles, tile_rows
from tests.quick import quick_jit

MODEL, FFN = 16, 12


def make_case(tokens, experts, chosen, skew=0.0, model=MODEL, ffn=FFN):
    """`skew` > 0 sends most tokens to the first experts."""
    rng = np.random.default_rng(0)
    preference = rng.random((tokens, experts)) + skew * np.arange(experts)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)  # noqa: E731
    ids = jnp.asarray(np.argsort(preference, axis=1)[:, :chosen], jnp.int32)
    weights = jnp.asarray(rng.random((tokens, chosen)), jnp.float32)
    return normal(tokens, model), ids, weights, normal(experts, model, 2 * ffn), normal(experts, ffn, model)


def exact(x, ids, weights, gate_up, down):
    """The definition, in float64 loops."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(np.asarray(ids)[t], weights[t], strict=True):
            gate, up = np.split(x[t] @ gate_up[expert], 2)
            out[t] += weight * (gate / (1 + np.exp(-gate)) * up) @ down[expert]
    return out


FUNCTIONS = {
    "reference": lambda *a: grouped_mlp(*a, implementation="reference"),
    "xla": lambda *a: grouped_mlp(*a, implementation="xla"),
    "xla as on accelerators": grouped_mlp_ragged,
}
CASES = [(1, 8, 2, 0), (7, 4, 4, 0), (16, 8, 2, 0), (40, 8, 2, 10), (33, 16, 3, 0.1)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", CASES)
def test_equals_float64_loops(function, shape):
    case = make_case(*shape)
    np.testing.assert_allclose(quick_jit(FUNCTIONS[function])(*case), exact(*case), atol=1e-6)


@pytest.mark.parametrize("shape", CASES[1:4])
def test_gradients_equal_those_of_the_reference(shape):
    x, ids, *others = make_case(*shape)
    pull = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def grads(function):
        def loss(x, weights, gate_up, down):
            return jnp.sum(function(x, ids, weights, gate_up, down) * pull)

        return quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, *others)

    for got, expected in zip(grads(FUNCTIONS["xla"]), grads(FUNCTIONS["reference"]), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("shape", CASES)
def test_every_tile_belongs_to_one_expert_and_holds_each_assignment_once(shape):
    _, ids, *_ = make_case(*shape)
    tile = tile_rows(*ids.shape, shape[1])
    tiles = plan_tiles(ids, shape[1], tile)
    slots = np.asarray(tiles.slot)
    assert len(np.unique(slots)) == slots.size
    assert slots.max() < int(tiles.num_tiles) * tile <= len(tiles.token)
    np.testing.assert_array_equal(np.asarray(tiles.token)[slots], np.arange(len(ids))[:, None].repeat(ids.shape[1], 1))
    np.testing.assert_array_equal(np.asarray(tiles.expert)[slots // tile], ids)


@pytest.mark.parametrize("tokens", [4, 16, 33])
def test_a_token_keeps_its_bits_among_others_and_at_another_place(tokens):
    x, ids, weights, gate_up, down = make_case(tokens, 8, 2, model=256, ffn=128)
    run = quick_jit(grouped_mlp_tiles)
    out = run(x, ids, weights, gate_up, down)
    order = np.random.default_rng(1).permutation(tokens)
    np.testing.assert_array_equal(run(x[order], ids[order], weights[order], gate_up, down), out[order])
    # All others crowd into one pair of experts: row 0 moves to another tile and another place in it.
    crowded = jnp.where(jnp.arange(tokens)[:, None] == 0, ids, jnp.array([0, 7]))
    np.testing.assert_array_equal(run(x, crowded, weights, gate_up, down)[0], out[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_id_beyond_the_last_expert_adds_nothing_forward_or_backward(function):
    x, ids, weights, *experts = make_case(12, 4, 2)
    is_absent = jnp.arange(24).reshape(12, 2) % 3 == 0
    absent = jnp.where(is_absent, 4, ids)

    def run(ids, weights):
        def loss(x, weights, *experts):
            out = FUNCTIONS[function](x, ids, weights, *experts)
            return jnp.sum(jnp.sin(out)), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True)(x, weights, *experts)
        return out, *grads

    got = quick_jit(run)(absent, weights)
    for a, b in zip(got, quick_jit(run)(ids, jnp.where(is_absent, 0.0, weights)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float8_experts_equal_their_dequantised_weights(function):
    x, ids, weights, *experts = make_case(9, 4, 2, model=130, ffn=70)
    (gate_up, gate_up_scale), (down, down_scale) = map(quick_jit(quantise_blocks), experts)
    got = quick_jit(FUNCTIONS[function])(x, ids, weights, gate_up, down, gate_up_scale, down_scale)
    plain = dequantise_blocks(gate_up, gate_up_scale, "float32"), dequantise_blocks(down, down_scale, "float32")
    np.testing.assert_allclose(got, exact(x, ids, weights, *plain), atol=5e-6)
