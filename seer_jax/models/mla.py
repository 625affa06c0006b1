"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A token leaves one row [c | k_rope] in the cache: the normed compressed kv and the rotated key all heads share.
*Absorbed*: queries are mapped into the latent space and attend to the rows themselves; cheap per cached token, for
rollout. *Expanded*: keys and values of every head are formed from c; cheap per query, for training. Both are the same
function of the parameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seer_jax.models.config import LORA_NORM_EPS, DecoderConfig
from seer_jax.models.layers import rms_norm
from seer_jax.models.rope import rotate
from seer_jax.models.specs import Params

QUERY_BLOCK = 128
"""Queries that attend together in training."""
MAX_QUERY_BLOCKS = 16
"""The blocks are unrolled; more of them would only cost compile time."""
MAX_KEPT_LENGTH = 2048
"""Up to this length the backward pass keeps the scores; beyond it recomputes them, a block at a time."""


class MLAQueries(NamedTuple):
    """Queries of T tokens: the part that meets the per-head keys and the rotated part that meets the shared key."""

    q_nope: Float[Array, "T H nope"]
    q_rope: Float[Array, "T H R"]


def project(
    params: Params,
    config: DecoderConfig,
    x: Float[Array, "T M"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
) -> tuple[MLAQueries, Float[Array, "T W"]]:
    """Compute queries and cache rows.

    Args:
        params: The layer's `attn` parameters.
        config: The shape.
        x: Normed residual stream.
        cos: Cosines of the tokens' angles.
        sin: Sines of the tokens' angles.

    Returns:
        Rotated queries, and rows [c | k_rope] of width `config.latent_width`, ready for the cache.
    """
    if config.q_lora_rank is None:
        q = x @ params["q_proj"]
    else:
        q = rms_norm(x @ params["q_a_proj"], params["q_a_norm"], LORA_NORM_EPS) @ params["q_b_proj"]
    q = q.reshape(x.shape[0], config.num_attention_heads, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    c, k_rope = jnp.split(x @ params["kv_a_proj"], [config.kv_lora_rank], axis=-1)
    latent = jnp.concatenate([rms_norm(c, params["kv_a_norm"], LORA_NORM_EPS), rotate(k_rope, cos, sin)], axis=-1)
    return MLAQueries(q_nope, rotate(q_rope, cos, sin)), latent


def absorb_queries(params: Params, queries: MLAQueries) -> Float[Array, "T H W"]:
    """Map queries into the latent space, so that their dot product with a cache row is the attention score."""
    q_latent = _per_head(queries.q_nope, params["k_up"])
    return jnp.concatenate([q_latent, queries.q_rope], axis=-1)


def unabsorb_values(params: Params, latent_out: Float[Array, "T H C"]) -> Float[Array, "T H v"]:
    """Map attention-weighted sums of c to each head's values."""
    return _per_head(latent_out, params["v_up"])


def _per_head(x: Float[Array, "T H a"], matrices: Float[Array, "H a b"]) -> Float[Array, "T H b"]:
    # Heads first on both sides: XLA's CPU backend runs the mixed einsum "tha,hab->thb" 3x slower.
    return jnp.swapaxes(jnp.einsum("hta,hab->htb", jnp.swapaxes(x, 0, 1), matrices), 0, 1)


def expanded_attention(
    params: Params, config: DecoderConfig, queries: MLAQueries, latent: Float[Array, "T W"], length: int
) -> Float[Array, "T H v"]:
    """Causal attention over T / length sequences of equal padded length, differentiable.

    Padding at the end of a sequence needs no mask: no real token looks forward. Shaped for speed on CPU too: one matmul
    each for keys and values of all heads, blocks of queries, late normalisation; 2-3x over the plain formula.

    Args:
        params: The layer's `attn` parameters.
        config: The shape.
        queries: Queries of all sequences, one after the other.
        latent: Their cache rows.
        length: Tokens per sequence, padding included.

    Returns:
        Values of every token and head.
    """
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    c, k_rope = jnp.split(latent, [rank], axis=-1)
    k_nope = (c @ params["k_up"].reshape(-1, rank).T).reshape(*queries.q_nope.shape)
    values = (c @ jnp.swapaxes(params["v_up"], 0, 1).reshape(rank, -1)).reshape(c.shape[0], heads, -1)
    keys = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, None], queries.q_rope.shape)], axis=-1)
    q = jnp.concatenate(queries, axis=-1) * config.softmax_scale
    q, keys, values = (jnp.swapaxes(a.reshape(-1, length, *a.shape[1:]), 1, 2) for a in (q, keys, values))
    attend = _causal_block if length <= MAX_KEPT_LENGTH else jax.checkpoint(_causal_block, static_argnums=3)
    block, blocks = max(QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS)), []
    for start in range(0, length, block):
        # A block of queries meets only the keys up to its own end: nearly half of all scores are never computed.
        end = min(start + block, length)
        blocks.append(attend(q[:, :, start:end], keys[:, :, :end], values[:, :, :end], start))
    out = jnp.swapaxes(jnp.concatenate(blocks, axis=2), 1, 2)
    return out.reshape(-1, *out.shape[2:])


def _causal_block(
    q: Float[Array, "B H Q D"], keys: Float[Array, "B H K D"], values: Float[Array, "B H K v"], start: int
) -> Float[Array, "B H Q v"]:
    """Attend from queries at `start`, `start` + 1, ... to the keys from 0 on; softmax in float32."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, keys, preferred_element_type=jnp.float32)
    visible = start + jnp.arange(q.shape[2])[:, None] >= jnp.arange(keys.shape[2])
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bhqk,bhkv->bhqv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # Normalising the sums touches far fewer numbers than normalising the weights.
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)
