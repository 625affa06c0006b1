"""Paged latent attention in plain XLA, at a cost that follows each request's own context.

A tile's context is cut into blocks. The blocks in use of all tiles form one list of work items, and a loop takes as
many of them at a time as there are tiles; its trip count is dynamic. One long request among short ones costs its own
blocks, not its length times the batch, and one program serves every context length.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.mla_attention.mask import MASK_BITS

BLOCK_TOKENS = 128
"""Least context of a work item: 40 KB of float32 rows 80 wide, well inside a core's cache."""
MAX_BLOCKS = 64
"""Most work items per tile: bounds the partial results that wait to be combined."""
MIN_ITEMS = 2
"""Least work items per trip round the loop."""


def mla_attention_xla(q, cache, block_tables, limits, tree_start, tree_mask, *, value_width, scale):
    """See `mla_attention`."""
    num_tiles, rows_per_tile, heads, width = q.shape
    page_size = cache.shape[1]
    pages_per_tile = block_tables.shape[1]
    pages_per_block = max(-(-BLOCK_TOKENS // page_size), -(-pages_per_tile // MAX_BLOCKS))
    blocks_per_tile = -(-pages_per_tile // pages_per_block)
    block_tokens = pages_per_block * page_size
    padding = blocks_per_tile * pages_per_block - pages_per_tile
    tables = jnp.pad(block_tables, ((0, 0), (0, padding))).reshape(num_tiles, blocks_per_tile, pages_per_block)

    in_use = limits > 0
    # Rows not in use see slot 0, so that their softmax is finite; their result is zeroed below.
    visible = jnp.repeat(jnp.maximum(limits, 1), heads, axis=1)
    queries = q.reshape(num_tiles, rows_per_tile * heads, width)

    last = jnp.max(limits, axis=1)
    if tree_mask is not None:
        highest = MASK_BITS - jax.lax.clz(tree_mask).astype(jnp.int32)
        last = jnp.maximum(last, jnp.max(jnp.where(tree_mask > 0, tree_start[:, None] + highest, 0), axis=1))
        masks = jnp.repeat(tree_mask, heads, axis=1)
    num_blocks = -(-last // block_tokens)
    ends = jnp.cumsum(num_blocks)
    num_items = min(num_tiles * blocks_per_tile, max(num_tiles, MIN_ITEMS))

    def run_items(trip, partials):
        item = trip * num_items + jnp.arange(num_items)
        tile = jnp.minimum(jnp.sum(item[:, None] >= ends, axis=1), num_tiles - 1)
        block = jnp.clip(item - (ends - num_blocks)[tile], 0, blocks_per_tile - 1)
        context = cache[tables[tile, block]].reshape(num_items, block_tokens, -1)[:, :, :width]
        slot = block[:, None] * block_tokens + jnp.arange(block_tokens)
        is_seen = slot[:, None] < visible[tile][:, :, None]
        if tree_mask is not None:
            node = slot - tree_start[tile][:, None]
            bits = masks[tile][:, :, None] >> jnp.clip(node, 0, MASK_BITS - 1).astype(jnp.uint32)[:, None]
            is_seen |= ((node >= 0) & (node < MASK_BITS))[:, None] & (bits & 1 == 1)
        scores = jnp.einsum("iqw,ikw->iqk", queries[tile], context, preferred_element_type=jnp.float32)
        scores = jnp.where(is_seen, scores * scale, -jnp.inf)
        # A row may see nothing of the tile's last block.
        peak = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - peak[:, :, None])
        # Whole rows are summed and cut afterwards: cutting the context first would copy it.
        values = jnp.einsum("iqk,ikw->iqw", weights.astype(q.dtype), context, preferred_element_type=jnp.float32)
        target = jnp.where(item < ends[-1], tile * blocks_per_tile + block, num_tiles * blocks_per_tile)
        new = (peak, jnp.sum(weights, axis=-1), values[:, :, :value_width])
        return tuple(old.at[target].set(part, mode="drop") for old, part in zip(partials, new, strict=True))

    shape = (num_tiles * blocks_per_tile, rows_per_tile * heads)
    empty = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, value_width)))
    partials = jax.lax.fori_loop(0, -(-ends[-1] // num_items), run_items, empty)
    peak, mass, values = (part.reshape(num_tiles, blocks_per_tile, *part.shape[1:]) for part in partials)
    share = jnp.exp(peak - jnp.maximum(jnp.max(peak, axis=1, keepdims=True), jnp.finfo(jnp.float32).min))
    out = jnp.sum(share[..., None] * values, axis=1) / jnp.maximum(jnp.sum(share * mass, axis=1), 1e-30)[..., None]
    out = out.reshape(num_tiles, rows_per_tile, heads, value_width)
    return jnp.where(in_use[:, :, None, None], out, 0.0).astype(q.dtype)
