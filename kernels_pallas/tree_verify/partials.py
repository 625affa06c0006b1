"""What one part of the vocabulary knows of a draw, and how parts combine; a part is a tile, a lane or a shard."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


class Partials(NamedTuple):
    """Of every row and one part of the vocabulary; a combination of parts has one axis less.

    Attributes:
        score: Largest logit / temperature + noise of the part; -inf if it has none.
        token_id: Its id in the whole vocabulary, the lowest of equals.
        logit: Its logit / temperature.
        log_sum_exp: Of all logits / temperature of the part; NaN if one of them is.
    """

    score: Float32[Array, "*parts E"]
    token_id: Int32[Array, "*parts E"]
    logit: Float32[Array, "*parts E"]
    log_sum_exp: Float32[Array, "*parts E"]


class Draws(NamedTuple):
    """One drawn token per row.

    Attributes:
        token_ids: The tokens.
        logprobs: Natural logarithm of their probabilities under softmax(logits / temperature), of softmax(logits) for
            temperature 0.
        log_sum_exp: Of logits / temperature; of the logits for temperature 0.
    """

    token_ids: Int32[Array, "E"]
    logprobs: Float32[Array, "E"]
    log_sum_exp: Float32[Array, "E"]


def combine(parts: Partials) -> Partials:
    """Combine over the first axis; the order of the parts does not matter to the token."""
    score = jnp.max(parts.score, axis=0)
    wins = parts.score == score
    token_id = jnp.min(jnp.where(wins, parts.token_id, jnp.iinfo(jnp.int32).max), axis=0)
    logit = jnp.max(jnp.where(wins & (parts.token_id == token_id), parts.logit, -jnp.inf), axis=0)
    return Partials(score, token_id, logit, jax.nn.logsumexp(parts.log_sum_exp, axis=0))


def all_combine(part: Partials, axis_name: str) -> Partials:
    """Combine over a mesh axis with one all-reduce of 16 bytes per row and shard.

    Every shard adds the bits of its four numbers into its own slot of zeros: exact, and typed as replicated. An
    all-gather would move half the bytes, but at these sizes latency counts, and its result is typed as varying.
    """
    shards, shard = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    bits = jnp.stack([jax.lax.bitcast_convert_type(field, jnp.int32) for field in part])
    slots = jnp.zeros((shards, *bits.shape), jnp.int32)
    slots = jax.lax.psum(jax.lax.dynamic_update_index_in_dim(slots, bits, shard, axis=0), axis_name)
    score, token_id, logit, log_sum_exp = slots[:, 0], slots[:, 1], slots[:, 2], slots[:, 3]
    as_float = [jax.lax.bitcast_convert_type(field, jnp.float32) for field in (score, logit, log_sum_exp)]
    return combine(Partials(as_float[0], token_id, as_float[1], as_float[2]))


def finish(part: Partials, vocab_size: int) -> Draws:
    """Draws from the combination of all parts; a row with a NaN takes the last token, with log-probability NaN."""
    token_ids = jnp.where(jnp.isnan(part.log_sum_exp), vocab_size - 1, part.token_id)
    return Draws(token_ids, part.logit - part.log_sum_exp, part.log_sum_exp)
