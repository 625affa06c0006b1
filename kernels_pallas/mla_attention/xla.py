"""Paged latent attention in plain XLA: the loop of `_paged.xla` with one KV head."""

import jax.numpy as jnp

from kernels_pallas._paged.xla import attend_pages


def mla_attention_xla(q, cache, block_tables, limits, tree_start, tree_mask, *, value_width, scale):
    """See `mla_attention`."""
    num_tiles, tokens, heads, width = q.shape

    def score(queries, rows):
        return jnp.einsum("iqw,ikw->iqk", queries, rows[:, :, :width], preferred_element_type=jnp.float32) * scale

    def weigh(weights, rows):
        # Whole rows are summed and cut afterwards: cutting the context first would copy it.
        weights = weights.astype(q.dtype)
        return jnp.einsum("iqk,ikw->iqw", weights, rows[:, :, :width], preferred_element_type=jnp.float32)

    out = attend_pages(
        q.reshape(num_tiles, tokens * heads, width),
        cache,
        block_tables,
        limits,
        tree_start,
        tree_mask,
        heads=(1, heads),
        score=score,
        weigh=weigh,
        value_width=value_width,
    )
    return out.reshape(num_tiles, tokens, heads, value_width).astype(q.dtype)
