"""Paged grouped-query attention, one query and head at a time."""

import jax
import jax.numpy as jnp

from kernels_pallas._paged.mask import MASK_BITS


def gqa_attention_reference(q, cache, block_tables, limits, tree_start, tree_mask, *, scale):
    """See `gqa_attention`. Softmax in float32 over the whole context of each query on its own."""
    heads, head_dim = q.shape[2:]
    heads_per_kv = heads // (cache.shape[2] // (2 * head_dim))
    if tree_mask is None:
        tree_start, tree_mask = jnp.zeros_like(limits[:, 0]), jnp.zeros(limits.shape, jnp.uint32)

    def attend_one(query, head, block_table, limit, start, mask):
        rows = cache[block_table].reshape(-1, cache.shape[2] // (2 * head_dim), 2, head_dim).astype(jnp.float32)
        keys, values = rows[:, head // heads_per_kv, 0], rows[:, head // heads_per_kv, 1]
        slot = jnp.arange(len(rows))
        node = slot - start
        in_tree = (node >= 0) & (node < MASK_BITS) & ((mask >> node.astype(jnp.uint32)) & 1 == 1)
        scores = jnp.where((slot < limit) | in_tree, keys @ query.astype(jnp.float32) * scale, -jnp.inf)
        return jnp.where(limit > 0, jax.nn.softmax(scores) @ values, 0.0).astype(q.dtype)

    attend_heads = jax.vmap(attend_one, in_axes=(0, 0, None, None, None, None))
    attend_tile = jax.vmap(attend_heads, in_axes=(0, None, None, 0, None, 0))
    attend = jax.vmap(attend_tile, in_axes=(0, None, 0, 0, 0, 0))
    return attend(q, jnp.arange(heads), block_tables, limits, tree_start, tree_mask)
