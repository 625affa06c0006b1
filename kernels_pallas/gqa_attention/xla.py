"""Paged grouped-query attention in plain XLA: the loop of `_paged.xla`, KV heads as a batch axis of its products."""

import jax.numpy as jnp

from kernels_pallas._paged.xla import attend_pages
from kernels_pallas.gqa_attention.layout import count_kv_heads


def gqa_attention_xla(q, cache, block_tables, limits, tree_start, tree_mask, *, scale):
    """See `gqa_attention`."""
    num_tiles, tokens, heads, head_dim = q.shape
    kv_heads = count_kv_heads(q, cache)
    shared = heads // kv_heads

    def score(queries, rows):
        keys = rows.reshape(*rows.shape[:2], kv_heads, 2, head_dim)[:, :, :, 0]
        scores = jnp.einsum("igqd,ikgd->igqk", queries, keys, preferred_element_type=jnp.float32) * scale
        return scores.reshape(len(rows), -1, rows.shape[1])

    def weigh(weights, rows):
        values = rows.reshape(*rows.shape[:2], kv_heads, 2, head_dim)[:, :, :, 1]
        weights = weights.reshape(len(rows), kv_heads, -1, rows.shape[1]).astype(q.dtype)
        sums = jnp.einsum("igqk,ikgd->igqd", weights, values, preferred_element_type=jnp.float32)
        return sums.reshape(len(rows), -1, head_dim)

    queries = q.reshape(num_tiles, tokens, kv_heads, shared, head_dim).swapaxes(1, 2)
    out = attend_pages(
        queries.reshape(num_tiles, kv_heads, tokens * shared, head_dim),
        cache,
        block_tables,
        limits,
        tree_start,
        tree_mask,
        heads=(kv_heads, shared),
        score=score,
        weigh=weigh,
        value_width=head_dim,
    )
    out = out.reshape(num_tiles, kv_heads, tokens, shared, head_dim).swapaxes(1, 2)
    return out.reshape(q.shape).astype(q.dtype)
