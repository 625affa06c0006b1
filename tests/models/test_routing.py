"""Experts noted and replayed, held against a router whose bias leaves it no choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.models import decoder, mla
from seer_jax.models.specs import Params, decoder_specs, init_params
from tests.engine import tiny

MODEL = dataclasses.replace(tiny.MODEL, num_hidden_layers=3, n_routed_experts=6)
TOKENS, FORCED = 20, ((4, 1), (0, 5))


def decoder_params(forced: tuple[tuple[int, int], ...] | None) -> Params:
    """Random weights; the bias of each MoE layer makes it choose the `forced` pair, or is small."""
    weights = init_params(jax.random.key(3), decoder_specs(MODEL, jnp.float32))
    for index, layer in enumerate(weights["layers"][1:]):
        bias = jnp.arange(6) * 0.01
        layer["moe"]["router_bias"] = bias if forced is None else bias.at[jnp.array(forced[index])].set(100.0)
    return weights


def forward(params: Params, replayed: np.ndarray | None = None, *, remat: bool = False) -> np.ndarray:
    given = None if replayed is None else jnp.asarray(replayed)[None]
    return np.asarray(decoder.forward_train(params, MODEL, jnp.arange(TOKENS)[None], replayed=given, remat=remat))[0]


def note(params: Params) -> np.ndarray:
    noted: list[jax.Array] = []

    def attend(_: int, queries: object, latent: jax.Array, attn: Params) -> jax.Array:
        return mla.expanded_attention(attn, MODEL, queries, latent, TOKENS)

    positions = jnp.arange(TOKENS)
    decoder.forward(params, MODEL, positions, positions, attend, note_experts=noted.append)
    return np.stack(noted, axis=1)


def test_what_is_noted_is_what_a_router_without_a_choice_must_take() -> None:
    noted = np.sort(note(decoder_params(FORCED)), axis=-1)
    assert (noted == np.sort(FORCED, axis=-1)).all() and noted.shape == (TOKENS, 2, 2)
    free = np.sort(note(decoder_params(None)), axis=-1)
    assert len(np.unique(free.reshape(TOKENS, -1), axis=0)) > 5


@pytest.mark.parametrize("remat", [False, True])
def test_replayed_experts_count_with_the_weights_of_now_and_minus_one_is_chosen_anew(remat: bool) -> None:
    free, forced = decoder_params(None), decoder_params(FORCED)
    everywhere = np.broadcast_to(np.array(FORCED, np.int16), (TOKENS, 2, 2))
    np.testing.assert_allclose(forward(free, everywhere, remat=remat), forward(forced), atol=1e-5)
    assert np.abs(forward(free) - forward(forced)).max() > 0.01
    np.testing.assert_array_equal(forward(free, np.full((TOKENS, 2, 2), -1, np.int16)), forward(free))
    np.testing.assert_allclose(forward(free, note(free)), forward(free), atol=1e-6)
    # A token sees what came before it only: replayed from the 8th on, the first 8 are as they were.
    tail = np.where(np.arange(TOKENS)[:, None, None] < 8, -1, everywhere).astype(np.int16)
    mixed = forward(free, tail)
    np.testing.assert_allclose(mixed[:8], forward(free)[:8], atol=1e-6)
    assert (np.abs(mixed[8:] - forward(free)[8:]).max(axis=-1) > 1e-3).any()


def test_gradients_reach_the_router_through_the_weights_of_replayed_experts() -> None:
    free, forced = decoder_params(None), decoder_params(FORCED)
    everywhere = jnp.broadcast_to(jnp.array(FORCED, jnp.int16), (1, TOKENS, 2, 2))

    def loss(params: Params, replayed: jax.Array | None) -> jax.Array:
        hidden = decoder.forward_train(params, MODEL, jnp.arange(TOKENS)[None], replayed=replayed)
        return jnp.sum(jnp.sin(hidden))

    replayed, expected = jax.grad(loss)(free, everywhere), jax.grad(loss)(forced, None)
    for got, want in zip(jax.tree.leaves(replayed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)
    assert jnp.abs(replayed["layers"][1]["moe"]["router"]).max() > 1e-3
