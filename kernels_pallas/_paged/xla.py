"""Attention over a paged cache in plain XLA, at a cost that follows each request's own context.

A tile's context is cut into blocks. The blocks in use of all tiles form one list of work items, and a loop takes as
many of them at a time as there are tiles; its trip count is dynamic. One long request among short ones costs its own
blocks, not its length times the batch, and one program serves every context length.
"""

import jax
import jax.numpy as jnp

from kernels_pallas._paged.layout import product_type
from kernels_pallas._paged.mask import MASK_BITS

BLOCK_TOKENS = 128
"""Least context of a work item: 40 KB of float32 rows 80 wide, well inside a core's cache."""
MAX_BLOCKS = 64
"""Most work items per tile: bounds the partial results that wait to be combined."""
MIN_ITEMS = 2
"""Least work items per trip round the loop."""


def attend_pages(queries, cache, block_tables, limits, tree_start, tree_mask, *, heads, score, weigh, value_width):
    """Attend from tiles of queries to the paged cache rows of their requests.

    Args:
        queries: Of each tile [N, ...], in any shape that `score` takes. A tile's rows are ordered by KV head, then
            token, then head.
        cache: Pages [pages, S, Wc].
        block_tables: As in `mla_attention`.
        limits: As in `mla_attention`, [N, Tq].
        tree_start: As in `mla_attention`.
        tree_mask: As in `mla_attention`.
        heads: KV heads, and query heads of each.
        score: (queries, cache rows [items, k, Wc] in `product_type`) -> scaled scores [items, rows, k] in float32.
        weigh: (weights [items, rows, k] in float32, cache rows) -> sums [items, rows, >= value width] in float32.
        value_width: Columns of the result.

    Returns:
        float32 [N, rows, value width]; zeros in rows that are not in use.
    """
    num_tiles, page_size, dtype = len(limits), cache.shape[1], product_type(queries.dtype, cache.dtype)
    pages_per_tile = block_tables.shape[1]
    pages_per_block = max(-(-BLOCK_TOKENS // page_size), -(-pages_per_tile // MAX_BLOCKS))
    blocks_per_tile = -(-pages_per_tile // pages_per_block)
    block_tokens = pages_per_block * page_size
    padding = blocks_per_tile * pages_per_block - pages_per_tile
    tables = jnp.pad(block_tables, ((0, 0), (0, padding))).reshape(num_tiles, blocks_per_tile, pages_per_block)

    def of_rows(of_tokens):
        return jnp.tile(jnp.repeat(of_tokens, heads[1], axis=1), (1, heads[0]))

    # Rows not in use see slot 0, so that their softmax is finite; their result is zeroed below.
    visible = of_rows(jnp.maximum(limits, 1))
    last = jnp.max(limits, axis=1)
    if tree_mask is not None:
        highest = MASK_BITS - jax.lax.clz(tree_mask).astype(jnp.int32)
        last = jnp.maximum(last, jnp.max(jnp.where(tree_mask > 0, tree_start[:, None] + highest, 0), axis=1))
        masks = of_rows(tree_mask)
    num_blocks = -(-last // block_tokens)
    ends = jnp.cumsum(num_blocks)
    num_items = min(num_tiles * blocks_per_tile, max(num_tiles, MIN_ITEMS))

    def run_items(trip, partials):
        item = trip * num_items + jnp.arange(num_items)
        tile = jnp.minimum(jnp.sum(item[:, None] >= ends, axis=1), num_tiles - 1)
        block = jnp.clip(item - (ends - num_blocks)[tile], 0, blocks_per_tile - 1)
        context = cache[tables[tile, block]].reshape(num_items, block_tokens, -1).astype(dtype)
        slot = block[:, None] * block_tokens + jnp.arange(block_tokens)
        is_seen = slot[:, None] < visible[tile][:, :, None]
        if tree_mask is not None:
            node = slot - tree_start[tile][:, None]
            bits = masks[tile][:, :, None] >> jnp.clip(node, 0, MASK_BITS - 1).astype(jnp.uint32)[:, None]
            is_seen |= ((node >= 0) & (node < MASK_BITS))[:, None] & (bits & 1 == 1)
        scores = jnp.where(is_seen, score(queries[tile], context), -jnp.inf)
        # A row may see nothing of the tile's last block.
        peak = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - peak[:, :, None])
        values = weigh(weights, context)
        target = jnp.where(item < ends[-1], tile * blocks_per_tile + block, num_tiles * blocks_per_tile)
        new = (peak, jnp.sum(weights, axis=-1), values[:, :, :value_width])
        return tuple(old.at[target].set(part, mode="drop") for old, part in zip(partials, new, strict=True))

    shape = (num_tiles * blocks_per_tile, visible.shape[1])
    empty = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, value_width)))
    partials = jax.lax.fori_loop(0, -(-ends[-1] // num_items), run_items, empty)
    peak, mass, values = (part.reshape(num_tiles, blocks_per_tile, *part.shape[1:]) for part in partials)
    share = jnp.exp(peak - jnp.maximum(jnp.max(peak, axis=1, keepdims=True), jnp.finfo(jnp.float32).min))
    out = jnp.sum(share[..., None] * values, axis=1) / jnp.maximum(jnp.sum(share * mass, axis=1), 1e-30)[..., None]
    return jnp.where(of_rows(limits > 0)[:, :, None], out, 0.0)
