"""What each step of the TPU kernel's grid does: planned in XLA, read from scalar memory."""

import jax
import jax.numpy as jnp

from kernels_pallas._paged.mask import MASK_BITS

PLAN_FIELDS = 7
"""First block, blocks, pages, buffer of the first block, whether it is its core's first, pages of the next item's first
block, slot where the tree starts."""


def plan_items(limits, mask, start, block_tables, page_size, pages_per_block, *, num_splits, per_core):
    """Lay out the work: item = split * tiles + tile is one step of the grid.

    Args:
        limits: Visible leading slots [tiles, tokens].
        mask: Tree masks [tiles, tokens]; 0 = none.
        start: Slot of a mask's lowest bit [tiles].
        block_tables: Pages [requests, P]; the tiles of a request are neighbours, the same number for each.
        page_size: Rows of a page.
        pages_per_block: Pages that are fetched and computed on together.
        num_splits: Parts of each tile's context that are worked on apart.
        per_core: Items of each core.

    Returns:
        int32 [items * PLAN_FIELDS] for scalar memory, and the pages [items, pages_per_block] of the first block of the
        next item of the same core that has any.
    """
    tiles, num_table_pages = len(limits), block_tables.shape[1]
    highest = start[:, None] + MASK_BITS - jax.lax.clz(mask).astype(jnp.int32)
    last = jnp.max(jnp.maximum(limits, jnp.where(mask > 0, highest, 0)), axis=1)
    pages = jnp.minimum(-(-last // page_size), num_table_pages)
    blocks = -(-pages // pages_per_block)
    split = jnp.arange(num_splits)[:, None]
    first = (blocks * split // num_splits).reshape(-1)
    end = (blocks * (split + 1) // num_splits).reshape(-1)
    tile = jnp.arange(num_splits * tiles) % tiles
    num_blocks = end - first
    num_pages = jnp.maximum(jnp.minimum(pages[tile], end * pages_per_block) - first * pages_per_block, 0)

    item = jnp.arange(num_splits * tiles)
    core_end = jnp.minimum((item // per_core + 1) * per_core, len(item))
    works = num_blocks > 0
    works_from = jax.lax.cummin(jnp.where(works, item, len(item)), reverse=True)
    following = jnp.append(works_from[1:], len(item))
    has_next = following < core_end
    following = jnp.where(has_next, following, 0)
    is_first = works & (item == works_from[item // per_core * per_core])
    plan = [
        first,
        num_blocks,
        num_pages,
        (jnp.cumsum(num_blocks) - num_blocks) % 2,
        is_first,
        jnp.where(has_next, jnp.minimum(num_pages[following], pages_per_block), 0),
        start[tile],
    ]
    place = first[following][:, None] * pages_per_block + jnp.arange(pages_per_block)
    owner = tile[following] // (tiles // len(block_tables))
    next_pages = block_tables[owner[:, None], jnp.minimum(place, num_table_pages - 1)]
    return jnp.stack([field.astype(jnp.int32) for field in plan], axis=1).reshape(-1), next_pages
