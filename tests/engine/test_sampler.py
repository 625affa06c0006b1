"""Sampling: the right law, keyed by request and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.engine.sampler import sample, truncate

VOCAB = 8


def draw(logits: np.ndarray, positions: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """Draw one token per row, all of request key (1, 2)."""
    rows = len(positions)
    return sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits))),
        jnp.tile(jnp.array([[1, 2]], jnp.uint32), (rows, 1)),
        jnp.asarray(positions, jnp.int32),
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        truncates=True,
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (1.3, 5, 0.8)]
)
def test_draws_follow_the_truncated_law(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(3).normal(size=VOCAB) * 1.5
    num_draws = 40_000
    tokens, logprobs = draw(logits, np.arange(num_draws), temperature=temperature, top_k=top_k, top_p=top_p)
    expected = law(logits, temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = np.sum((counts[kept] - num_draws * expected[kept]) ** 2 / (num_draws * expected[kept]))
    assert chi_square < 24.3  # 99.9 % quantile at 7 degrees of freedom
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=2e-6)


def law(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Token by token: temperature, then the top_k likeliest, then the smallest set of these with mass top_p."""
    p = np.exp(logits / temperature)
    order = np.argsort(-p)[: top_k or VOCAB]
    p_kept = p[order] / p[order].sum()
    nucleus = order[: np.searchsorted(np.cumsum(p_kept), top_p) + 1] if top_p < 1 else order
    out = np.zeros(VOCAB)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_on_ties() -> None:
    tokens, _ = draw(np.array([0.0, 2.0, 2.0, 1.0]), np.arange(50), temperature=0.0)
    assert (np.asarray(tokens) == 1).all()


def test_draw_depends_on_key_and_position_not_on_row_or_batch() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, VOCAB)), jnp.float32)
    keys = jnp.asarray(rng.integers(0, 2**32, (6, 2)), jnp.uint32)
    positions = jnp.arange(6, dtype=jnp.int32) * 7
    plain = (jnp.ones(6), jnp.zeros(6, jnp.int32), jnp.ones(6))
    run = jax.jit(sample, static_argnames="truncates")
    tokens, logprobs = run(logits, keys, positions, *plain, truncates=False)
    order = rng.permutation(6)
    moved, moved_logprobs = run(logits[order], keys[order], positions[order], *plain, truncates=False)
    assert (tokens[order] == moved).all() and (logprobs[order] == moved_logprobs).all()
    alone = [run(*(x[i : i + 1] for x in (logits, keys, positions, *plain)), truncates=False)[0][0] for i in range(6)]
    assert (tokens == jnp.stack(alone)).all()


def test_different_keys_and_positions_give_independent_noise() -> None:
    logits = np.zeros(VOCAB)
    by_position, _ = draw(logits, np.arange(2000))
    keys = jnp.stack([jnp.arange(2000), jnp.zeros(2000)], axis=1).astype(jnp.uint32)
    flat = jnp.zeros((2000, VOCAB))
    ones = jnp.ones(2000)
    by_key, _ = sample(flat, keys, jnp.zeros(2000, jnp.int32), ones, jnp.zeros(2000, jnp.int32), ones, truncates=False)
    agreement = np.mean(np.asarray(by_position) == np.asarray(by_key))
    assert abs(agreement - 1 / VOCAB) < 0.03


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=VOCAB), st.integers(0, VOCAB), st.floats(0.05, 1.0))
def test_truncation_keeps_the_likeliest_and_never_everything_else(
    logits: list[float], top_k: int, top_p: float
) -> None:
    out = np.asarray(truncate(jnp.array([logits], jnp.float32), jnp.array([top_k]), jnp.array([top_p], jnp.float32)))[0]
    kept = np.isfinite(out)
    assert kept[int(np.argmax(logits))]
    if not kept.all():
        assert np.array(logits, np.float32)[kept].min() > np.array(logits, np.float32)[~kept].max()
