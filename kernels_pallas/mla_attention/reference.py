"""Paged latent attention, one query at a time."""

import jax
import jax.numpy as jnp


def mla_attention_reference(q, cache, block_tables, first_position, num_queries, *, value_width, scale):
    """See `mla_attention`. Softmax in float32 over the whole context of each query on its own."""

    def attend_one(query, block_table, position, in_use):
        rows = cache[block_table].reshape(-1, cache.shape[-1]).astype(jnp.float32)
        scores = query.astype(jnp.float32) @ rows.T * scale
        visible = jnp.arange(rows.shape[0]) <= position
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.where(in_use, weights @ rows[:, :value_width], 0.0).astype(q.dtype)

    offsets = jnp.arange(q.shape[1])
    attend_tile = jax.vmap(attend_one, in_axes=(0, None, 0, 0))
    return jax.vmap(attend_tile)(q, block_tables, first_position[:, None] + offsets, offsets < num_queries[:, None])
