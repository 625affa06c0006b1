"""Paged latent attention as two matmuls over the gathered context of each tile."""

import jax
import jax.numpy as jnp


def mla_attention_xla(q, cache, block_tables, first_position, num_queries, *, value_width, scale):
    """See `mla_attention`."""
    tiles, rows_per_tile, heads, width = q.shape
    context = cache[block_tables].reshape(tiles, -1, width)
    offsets = jnp.arange(rows_per_tile)
    # Rows not in use see position 0, so that their softmax is finite; their result is zeroed below.
    positions = jnp.where(offsets < num_queries[:, None], first_position[:, None] + offsets, 0)
    visible = jnp.arange(context.shape[1]) <= jnp.repeat(positions, heads, axis=1)[:, :, None]
    flat_q = q.reshape(tiles, rows_per_tile * heads, width)
    scores = jnp.einsum("nqw,nkw->nqk", flat_q, context, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf), axis=-1)
    values = context[:, :, :value_width]
    out = jnp.einsum("nqk,nkc->nqc", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    out = out.reshape(tiles, rows_per_tile, heads, value_width)
    return jnp.where((offsets < num_queries[:, None])[:, :, None, None], out, 0.0).astype(q.dtype)
