"""Paged grouped-query attention in plain XLA: the loop of `_paged.xla`, KV heads as a batch axis of its products.

Keys and values stay together: queries are padded with zeros that meet the value, and sums are taken over both and cut.
Cutting the context instead copies it, which on CPU costs more than the additional products.
"""

import jax.numpy as jnp

from kernels_pallas._paged.xla import attend_pages
from kernels_pallas.gqa_attention.layout import count_kv_heads


def gqa_attention_xla(q, cache, block_tables, limits, tree_start, tree_mask, *, scale):
    """See `gqa_attention`."""
    num_tiles, tokens, heads, head_dim = q.shape
    kv_heads = count_kv_heads(q, cache)
    shared = heads // kv_heads

    def by_head(rows):
        return rows.reshape(*rows.shape[:2], kv_heads, 2 * head_dim).swapaxes(1, 2)

    def score(queries, rows):
        scores = jnp.einsum("igqw,igkw->igqk", queries, by_head(rows), preferred_element_type=jnp.float32)
        return scores.reshape(len(rows), -1, rows.shape[1]) * scale

    def weigh(weights, rows):
        weights = weights.reshape(len(rows), kv_heads, -1, rows.shape[1]).astype(q.dtype)
        sums = jnp.einsum("igqk,igkw->igqw", weights, by_head(rows), preferred_element_type=jnp.float32)
        return sums[..., head_dim:].reshape(len(rows), -1, head_dim)

    queries = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    queries = queries.reshape(num_tiles, tokens, kv_heads, shared, 2 * head_dim).swapaxes(1, 2)
    out = attend_pages(
        queries.reshape(num_tiles, kv_heads, tokens * shared, 2 * head_dim),
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
