"""Attention over a paged cache for Hopper, in Mosaic GPU: one kernel for decode, tree verification and prompt slices.

`mla_attention` and `gqa_attention` are this kernel, with the cache that `_paged.tpu` describes.

Work. The rows of a KV head of a tile, tokens x heads, are cut into blocks of 64, what wgmma multiplies at a time. A
thread block has one of them and the whole context of its request, or a part of it where that fills the multiprocessors
better (`choose_splits`): parts combine in XLA by their log-sum-exp. It walks only over what any of its rows sees.

A warpgroup copies the KV head's columns of pages by the block table into buffers of 64 context tokens while others
compute on another buffer. With values of 512 columns these are two: both compute the same scores and weights, and each
has half of the value's columns, since the sums of 64 x 512 do not fit into one's registers. So weights go from
registers into the second product and nothing is exchanged; at 576 and 512 columns that makes 1.53 times the products of
a kernel that shares the scores.

A float8 cache is copied as it is, half the bytes. The warpgroups that multiply first make bfloat16 of a block, each of
every other 64 columns, in a buffer that they then share; so they wait for each other twice a block.

Shared memory at 576 columns: 72 KB of queries and twice 72 KB of context; in float8 twice 36 KB and 72 KB in bfloat16.

The cache must be finite: weights of slots that nobody sees are 0. Of a context's last block only pages in use are read.
"""

from functools import partial
from math import e, log2

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas._mosaic_gpu import (
    BY_ROW,
    LAYOUT,
    MULTIPROCESSORS,
    SLAB,
    WGMMA_ROWS,
    accumulate,
    divide_registers,
    multiply_transposed,
    slabs,
    upcast,
    with_layout,
)
from kernels_pallas._paged.layout import FLOAT8
from kernels_pallas._paged.mask import MASK_BITS

BLOCK_TOKENS = 64
"""Context tokens that are fetched and computed on together."""
SMEM_BYTES = 216 << 10
"""Shared memory for queries and context; a thread block of a Hopper chip has 227 KB in all, and 5 go to the rest."""
MAX_STAGES = 4
MAX_PART = 256
"""Columns of a value whose sums, 128 registers of a thread, a warpgroup can hold."""
FLOAT_MAX = 3.4028234663852886e38


def attend_pages(
    q,
    cache,
    block_tables,
    limits,
    tree_start,
    tree_mask,
    *,
    kv_heads,
    value_start,
    value_width,
    scale,
    name,
    interpret=None,
    num_splits=None,
    value_parts=None,
):
    """Attend from tiles of queries to the paged cache rows of their requests.

    Args:
        q: Queries [tile, token, head, key width], bfloat16; heads of one KV head are neighbours.
        cache: Pages [pages, S, Wc], bfloat16 or float8_e4m3fn, finite everywhere (`why_not_gpu`).
        block_tables: As in `mla_attention`.
        limits: As in `mla_attention`.
        tree_start: As in `mla_attention`.
        tree_mask: As in `mla_attention`.
        kv_heads: KV heads of a row.
        value_start: First column of a KV head's value.
        value_width: Columns of a value.
        scale: Factor on the scores.
        name: Of the kernel, in traces.
        interpret: `InterpretGPUParams` to run without a GPU; for tests.
        num_splits: Parts of each context that are worked on apart; None chooses.
        value_parts: 1 or 2 warpgroups that share the value's columns; None chooses.

    Returns:
        Weighted means of values [tile, token, head, value width] in the type of q; zeros in rows that are not in use.
    """
    tiles, tokens, num_heads, key_width = q.shape
    heads, page_size = num_heads // kv_heads, cache.shape[1]
    row_blocks = -(-tokens * heads // WGMMA_ROWS)
    rows, items = row_blocks * WGMMA_ROWS, tiles * kv_heads
    padding = (0, rows - tokens * heads)
    value_parts = value_parts or -(-value_width // MAX_PART)
    head_width = max(key_width, value_start + value_width)
    is_float8 = cache.dtype == FLOAT8
    occupied = WGMMA_ROWS * key_width * 2 + is_float8 * BLOCK_TOKENS * head_width * 2
    stages = min((SMEM_BYTES - occupied) // (BLOCK_TOKENS * head_width * cache.dtype.itemsize), MAX_STAGES)
    has_trees = tree_mask is not None

    def by_row(by_token):
        return jnp.pad(jnp.repeat(by_token, heads, axis=1), ((0, 0), padding))

    last = limits
    if has_trees:
        tree_mask = jnp.where(limits > 0, tree_mask, 0)
        highest = MASK_BITS - jax.lax.clz(tree_mask).astype(jnp.int32)
        last = jnp.maximum(last, jnp.where(tree_mask > 0, tree_start[:, None] + highest, 0))
    last = jnp.max(by_row(last).reshape(tiles, row_blocks, WGMMA_ROWS), axis=2)
    num_pages = jnp.minimum(-(-last // page_size), block_tables.shape[1]).astype(jnp.int32)
    if num_splits is None:
        max_tokens, row_bytes = block_tables.shape[1] * page_size, head_width * cache.dtype.itemsize
        num_splits = choose_splits(items * row_blocks, max_tokens, value_width, row_bytes)

    q = q.reshape(tiles, tokens, kv_heads, heads, key_width).swapaxes(1, 2).reshape(items, tokens * heads, key_width)
    scalars = [num_pages, block_tables.astype(jnp.int32)]
    columns = [by_row(limits.astype(jnp.int32))]
    if has_trees:
        scalars.append(tree_start.astype(jnp.int32))
        columns.append(jax.lax.bitcast_convert_type(by_row(tree_mask), jnp.int32))
    copied_rows = min(page_size, BLOCK_TOKENS)
    parts, log_sum_exps = plgpu.kernel(
        partial(
            _kernel,
            kv_heads=kv_heads,
            value_start=value_start,
            value_width=value_width,
            value_parts=value_parts,
            scale=scale * log2(e),
            num_splits=num_splits,
            has_trees=has_trees,
            interpret=interpret,
        ),
        out_type=[
            jax.ShapeDtypeStruct((num_splits, items, rows, value_width), q.dtype if num_splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((num_splits, items, rows), jnp.float32),
        ],
        scratch_types=[
            slabs((WGMMA_ROWS, key_width)),
            slabs((stages, BLOCK_TOKENS, head_width), cache.dtype),
            slabs((1, BLOCK_TOKENS, head_width)) if is_float8 else None,
            [plgpu.SMEM((WGMMA_ROWS,), jnp.int32) for _ in columns],
            plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + len(columns)),
            plgpu.Barrier(num_arrivals=BLOCK_TOKENS // copied_rows, num_barriers=stages),
            plgpu.Barrier(num_arrivals=value_parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=value_parts) if is_float8 else None,
        ],
        grid=(num_splits, items, row_blocks),
        grid_names=("splits", "items", "rows"),
        num_threads=value_parts + 1,
        thread_name="warpgroup",
        kernel_name=name,
        interpret=interpret,
    )(*scalars, *columns, jnp.pad(q, ((0, 0), padding, (0, 0))), cache)
    if num_splits == 1:
        out = parts[0]
    else:
        # A row that sees nothing has -inf everywhere.
        peak = jnp.maximum(jnp.max(log_sum_exps, axis=0), -FLOAT_MAX)
        share = jnp.exp2(log_sum_exps - peak)
        share = share / jnp.maximum(jnp.sum(share, axis=0), jnp.finfo(jnp.float32).tiny)
        out = jnp.sum(share[..., None] * parts, axis=0).astype(q.dtype)
    out = out[:, : tokens * heads].reshape(tiles, kv_heads, tokens, heads, value_width).swapaxes(1, 2)
    return out.reshape(tiles, tokens, num_heads, value_width)


def choose_splits(row_blocks: int, max_tokens: int, value_width: int, row_bytes: int) -> int:
    """Choose the parts of each context so that waves of thread blocks, one a multiprocessor, take the least time.

    Shapes alone decide, so that the deterministic mode, which has one shape, always adds alike. Contexts are taken to
    be a quarter of what tables hold; a part costs writing and reading its sums. There are 4 waves of parts at most, 69
    MB of sums of 512 columns, and one part of each context where more save less than a tenth.

    Args:
        row_blocks: Blocks of 64 rows.
        max_tokens: The longest context that tables hold.
        value_width: Columns of a value, float32 in sums.
        row_bytes: Bytes of a context token of a KV head.

    Returns:
        Parts of each context.
    """
    part_tokens = WGMMA_ROWS * value_width * 2 * 4 / row_bytes

    def cost(splits: int) -> float:
        waves = -(-row_blocks * splits // MULTIPROCESSORS)
        return waves * (max_tokens / 4 / splits + (splits > 1) * part_tokens)

    most = min(4 * MULTIPROCESSORS // row_blocks, -(-max_tokens // BLOCK_TOKENS))
    best = min(range(1, max(most, 1) + 1), key=cost)
    return best if cost(best) < 0.9 * cost(1) else 1


def _kernel(*refs, kv_heads, value_start, value_width, value_parts, scale, num_splits, has_trees, interpret):
    """Attend with 64 rows of a KV head of a tile, an item, to a part of its context.

    Args:
        refs: In HBM: pages in use [tiles, row blocks]; block tables [tiles, P]; with trees their first slots [tiles];
            limits [tiles, rows]; with trees masks [tiles, rows]; queries [items, rows, key width]; cache [pages, S,
            Wc]; out: weighted means of values [splits, items, rows, value_width] and log2 of the sums of 2 ** score
            [splits, items, rows]. Then the scratch.
        kv_heads: As in `attend_pages`.
        value_start: As there.
        value_width: As there.
        value_parts: As there.
        scale: Factor on the scores, log2(e) included.
        num_splits: Parts of the context.
        has_trees: Whether rows have masks.
        interpret: Whether an interpreter runs this.
    """
    num_pages, tables, *refs = refs
    tree_start, *refs = refs if has_trees else (None, *refs)
    columns, refs = refs[: 1 + has_trees], refs[1 + has_trees :]
    q, cache, out, log_sum_exp, *scratch = refs
    queries, context, upcast_context, column_buffers, result_buffer, columns_filled, filled, emptied, met = scratch
    split, item, row_block = (jax.lax.axis_index(name) for name in ("splits", "items", "rows"))
    tile, kv_head = item // kv_heads, item % kv_heads
    warpgroup = jax.lax.axis_index("warpgroup")
    rows = pl.ds(row_block * WGMMA_ROWS, WGMMA_ROWS)
    page_size, key_width = cache.shape[1], q.shape[2]
    stages, _, head_width = context.shape
    part_width = value_width // value_parts
    copied_rows = min(page_size, BLOCK_TOKENS)
    pages = num_pages[tile, row_block]
    blocks = (pages * page_size + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    first, end = blocks * split // num_splits, blocks * (split + 1) // num_splits

    @pl.when(warpgroup == value_parts)
    def _copy():
        divide_registers(value_parts, is_copying=True)
        plgpu.copy_gmem_to_smem(q.at[item, rows], queries, columns_filled)
        for column, target in zip(columns, column_buffers, strict=True):
            plgpu.copy_gmem_to_smem(column.at[tile, rows], target, columns_filled)
        of_head = pl.ds(kv_head * (cache.shape[2] // kv_heads), head_width)

        @pl.loop(0, end - first)
        def _(step):
            stage = step % stages
            slots = [(first + step) * BLOCK_TOKENS + start for start in range(0, BLOCK_TOKENS, copied_rows)]
            # A block may end behind the last page in use, which is then read again.
            places = [(tables[tile, jnp.minimum(slot // page_size, pages - 1)], slot % page_size) for slot in slots]
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            for start, (page, offset) in zip(range(0, BLOCK_TOKENS, copied_rows), places, strict=True):
                plgpu.copy_gmem_to_smem(
                    cache.at[page, pl.ds(offset, copied_rows), of_head],
                    context.at[stage, pl.ds(start, copied_rows)],
                    filled.at[stage],
                )

        @pl.loop(jnp.maximum(end - first - stages, 0), end - first)
        def _(step):
            plgpu.barrier_wait(emptied.at[step % stages])

    @pl.when(warpgroup < value_parts)
    def _attend():
        divide_registers(value_parts, is_copying=False)
        start = warpgroup * part_width if value_parts > 1 else 0
        part, value = pl.ds(start, part_width), pl.ds(value_start + start, part_width)
        plgpu.barrier_wait(columns_filled)
        place = jax.lax.broadcasted_iota(jnp.int32, (WGMMA_ROWS, BLOCK_TOKENS), 1)
        place = with_layout(place, LAYOUT, interpret)

        def spread(by_row, num_columns=BLOCK_TOKENS):
            return jax.lax.broadcast_in_dim(by_row, (WGMMA_ROWS, num_columns), (0,))

        def meet():
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def upcast_block(step, stage):
            @pl.loop(warpgroup, head_width // SLAB, step=value_parts)  # Written out, they would take all registers.
            def _(slab):
                columns = pl.ds(slab * SLAB, SLAB)
                upcast(context.at[stage, :, columns], upcast_context.at[0, :, columns], interpret)

            plgpu.barrier_arrive(emptied.at[stage])
            plgpu.commit_smem()
            meet()
            # Always the first, but no constant: the compiler would keep the addresses of all its parts in registers.
            return upcast_context.at[step >> 30]

        def attend_block(step, state):
            total, peak, mass = state
            stage = step % stages
            plgpu.barrier_wait(filled.at[stage])
            block = context.at[stage] if upcast_context is None else upcast_block(step, stage)
            scores = multiply_transposed(queries, block.at[:, pl.ds(0, key_width)], interpret) * scale
            limit, *mask = (with_layout(buffer[...], BY_ROW, interpret) for buffer in column_buffers)
            slot = (first + step) * BLOCK_TOKENS + place
            is_seen = slot < spread(limit)
            if has_trees:
                node = slot - tree_start[tile]
                bit = jax.lax.shift_right_logical(spread(mask[0]), jnp.clip(node, 0, MASK_BITS - 1)) & 1
                is_seen |= (node >= 0) & (node < MASK_BITS) & (bit == 1)
            scores = jnp.where(is_seen, scores, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
            fade = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - spread(new_peak))
            mass = mass * fade + jnp.sum(weights, axis=1)
            total = total * spread(fade, part_width)
            total = accumulate(total, weights.astype(jnp.bfloat16), block.at[:, value], interpret)
            if upcast_context is None:
                plgpu.barrier_arrive(emptied.at[stage])
            else:
                meet()
            return total, new_peak, mass

        nothing = (
            with_layout(jnp.zeros((WGMMA_ROWS, part_width), jnp.float32), LAYOUT, interpret),
            with_layout(jnp.full(WGMMA_ROWS, -FLOAT_MAX, jnp.float32), BY_ROW, interpret),
            with_layout(jnp.zeros(WGMMA_ROWS, jnp.float32), BY_ROW, interpret),
        )
        total, peak, mass = jax.lax.fori_loop(0, end - first, attend_block, nothing)
        # Rows that see nothing stay zero.
        total = total / spread(jnp.maximum(mass, jnp.finfo(jnp.float32).tiny), part_width)
        out.at[split, item, rows, part][...] = total.astype(out.dtype)

        @pl.when(warpgroup == 0)
        def _():
            result_buffer[...] = peak + jnp.log(mass) * log2(e)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_buffer, log_sum_exp.at[split, item, rows])
            plgpu.wait_smem_to_gmem(0)
