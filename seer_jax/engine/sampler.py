"""Position-keyed sampling: one token, one key.

The token of a request at absolute position p is `argmax(logits / T + gumbel(fold_in(request_key, p)))`. It depends on
the logits, the request's key and the position alone: chunking, placement, batch mates and preemption cannot change it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32


def sample(
    logits: Float32[Array, "E V"],
    keys: UInt32[Array, "E 2"],
    positions: Int32[Array, "E"],
    temperature: Float32[Array, "E"],
    top_k: Int32[Array, "E"],
    top_p: Float32[Array, "E"],
    *,
    truncates: bool,
) -> tuple[Int32[Array, "E"], Float32[Array, "E"]]:
    """Draw one token per row.

    Args:
        logits: Unscaled logits.
        keys: Threefry key of each request.
        positions: Absolute position of the token to draw.
        temperature: 0 takes the likeliest token (lowest id on ties).
        top_k: Likeliest tokens kept; 0 keeps all.
        top_p: Nucleus mass kept.
        truncates: Whether top-k and top-p are looked at.

    Returns:
        Token ids, and their log-probabilities under the distribution drawn from (temperature and truncation applied;
        for temperature 0 the unscaled distribution).
    """
    is_greedy = temperature <= 0
    scaled = logits / jnp.where(is_greedy, 1.0, temperature)[:, None]
    if truncates:
        scaled = truncate(scaled, top_k, top_p)
    noise = jax.vmap(lambda key, p: jax.random.gumbel(_fold_in(key, p), logits.shape[-1:]))(keys, positions)
    tokens = first_largest(scaled + jnp.where(is_greedy[:, None], 0.0, noise))
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)


def first_largest(scores: Float32[Array, "E V"]) -> Int32[Array, "E"]:
    """Index of the largest score of every row, the lowest of equals.

    `jnp.argmax` of scores that XLA:CPU computes on the way computes them more than once: 3x slower with the noise.
    """
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    is_largest = scores == jnp.max(scores, axis=-1, keepdims=True)
    # NaN is not equal to itself; the last token then stands for none.
    return jnp.min(jnp.where(is_largest, index, scores.shape[-1] - 1), axis=-1)


def truncate(
    logits: Float32[Array, "E V"], top_k: Int32[Array, "E"], top_p: Float32[Array, "E"]
) -> Float32[Array, "E V"]:
    """Set logits outside top-k, then outside the top-p nucleus of what is left, to -inf; equal logits share their fate.

    The nucleus is the smallest set of likeliest tokens whose mass reaches `top_p`; the likeliest always stays.
    """
    vocab = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocab)
    in_top_k = rank < jnp.where(top_k > 0, top_k, vocab)[:, None]
    mass = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(mass, axis=-1) - mass
    kept = in_top_k & ((mass_before < top_p[:, None]) | (rank == 0))
    threshold = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _fold_in(key: UInt32[Array, "2"], position: Int32[Array, ""]) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
