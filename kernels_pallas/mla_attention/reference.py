"""Paged latent attention, one query at a time."""

import jax
import jax.numpy as jnp

from kernels_pallas._paged.mask import MASK_BITS


def mla_attention_reference(q, cache, block_tables, limits, tree_start, tree_mask, *, value_width, scale):
    """See `mla_attention`. Softmax in float32 over the whole context of each query on its own."""
    if tree_mask is None:
        tree_start, tree_mask = jnp.zeros_like(limits[:, 0]), jnp.zeros(limits.shape, jnp.uint32)

    def attend_one(query, block_table, limit, start, mask):
        rows = cache[block_table].reshape(-1, cache.shape[-1])[:, : q.shape[-1]].astype(jnp.float32)
        scores = query.astype(jnp.float32) @ rows.T * scale
        slot = jnp.arange(rows.shape[0])
        node = slot - start
        in_tree = (node >= 0) & (node < MASK_BITS) & ((mask >> node.astype(jnp.uint32)) & 1 == 1)
        weights = jax.nn.softmax(jnp.where((slot < limit) | in_tree, scores, -jnp.inf), axis=-1)
        return jnp.where(limit > 0, weights @ rows[:, :value_width], 0.0).astype(q.dtype)

    attend_tile = jax.vmap(attend_one, in_axes=(0, None, 0, None, 0))
    return jax.vmap(attend_tile)(q, block_tables, limits, tree_start, tree_mask)
