"""Paged latent attention for Hopper, in Mosaic GPU: one kernel for decode, tree verification and prompt slices.

Work. The rows of a tile, tokens x heads, are cut into blocks of 64, what wgmma multiplies at a time. A thread block has
one of them and the whole context of its request, or with few tiles a part of it (`num_splits`): parts combine in XLA by
their log-sum-exp. It walks only over what any of its rows sees.

A warpgroup copies pages by the block table into one of two buffers of 64 context tokens while two others compute on the
other buffer. Both of these compute the same scores and weights, and each has half of the value's columns, since the
sums of 64 x 512 do not fit into one's registers. So weights go from registers into the second product and nothing is
exchanged; at 576 and 512 columns that makes 1.53 times the products of a kernel that shares the scores.

Shared memory at 576 columns: 72 KB of queries, twice 72 KB of context; 217 of a thread block's 227 KB.

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
    COPY_REGISTERS,
    LAYOUT,
    MULTIPROCESSORS,
    WGMMA_ROWS,
    accumulate,
    count_registers,
    multiply_transposed,
    slabs,
    with_layout,
)
from kernels_pallas._paged.mask import MASK_BITS
from kernels_pallas.mla_attention.layout import why_not_pallas_gpu

BLOCK_TOKENS = 64
"""Context tokens that are fetched and computed on together."""
STAGES = 2
FLOAT_MAX = 3.4028234663852886e38


def mla_attention_pallas_gpu(
    q, cache, block_tables, limits, tree_start, tree_mask, *, value_width, scale, interpret=None, num_splits=None
):
    """See `mla_attention`.

    Args:
        q: As there, bfloat16.
        cache: As there, bfloat16.
        block_tables: As there.
        limits: As there.
        tree_start: As there.
        tree_mask: As there.
        value_width: As there, a multiple of 128.
        scale: As there.
        interpret: `InterpretGPUParams` to run without a GPU; for tests.
        num_splits: Parts of each context that are worked on apart; None chooses.

    Returns:
        As there.

    Raises:
        ValueError: If the kernel cannot serve these shapes (`why_not_pallas_gpu`).
    """
    if (reason := why_not_pallas_gpu(q, cache, value_width)) is not None:
        raise ValueError(f"mla_attention: pallas_gpu cannot serve this call: {reason}")
    tiles, tokens, heads, width = q.shape
    page_size = cache.shape[1]
    row_blocks = -(-tokens * heads // WGMMA_ROWS)
    rows = row_blocks * WGMMA_ROWS
    has_trees = tree_mask is not None

    def by_row(by_token):
        return jnp.pad(jnp.repeat(by_token, heads, axis=1), ((0, 0), (0, rows - tokens * heads)))

    last = limits
    if has_trees:
        tree_mask = jnp.where(limits > 0, tree_mask, 0)
        highest = MASK_BITS - jax.lax.clz(tree_mask).astype(jnp.int32)
        last = jnp.maximum(last, jnp.where(tree_mask > 0, tree_start[:, None] + highest, 0))
    last = jnp.max(by_row(last).reshape(tiles, row_blocks, WGMMA_ROWS), axis=2)
    num_pages = jnp.minimum(-(-last // page_size), block_tables.shape[1]).astype(jnp.int32)
    if num_splits is None:
        most = -(-block_tables.shape[1] * page_size // BLOCK_TOKENS)
        num_splits = max(min(MULTIPROCESSORS // (tiles * row_blocks), most), 1)

    scalars = [num_pages, block_tables.astype(jnp.int32)]
    columns = [by_row(limits.astype(jnp.int32))]
    if has_trees:
        scalars.append(tree_start.astype(jnp.int32))
        columns.append(jax.lax.bitcast_convert_type(by_row(tree_mask), jnp.int32))
    copied_rows = min(page_size, BLOCK_TOKENS)
    parts, log_sum_exps = plgpu.kernel(
        partial(
            _kernel, value_width=value_width, scale=scale * log2(e), num_splits=num_splits, has_trees=has_trees,
            interpret=interpret,
        ),
        out_type=[
            jax.ShapeDtypeStruct((num_splits, tiles, rows, value_width), q.dtype if num_splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((num_splits, tiles, rows), jnp.float32),
        ],
        scratch_types=[
            slabs((WGMMA_ROWS, width)),
            slabs((STAGES, BLOCK_TOKENS, width)),
            [plgpu.SMEM((WGMMA_ROWS,), jnp.int32) for _ in columns],
            plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + len(columns)),
            plgpu.Barrier(num_arrivals=BLOCK_TOKENS // copied_rows, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(num_splits, tiles, row_blocks),
        grid_names=("splits", "tiles", "rows"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mla_attention",
        interpret=interpret,
    )(
        *scalars,
        *columns,
        jnp.pad(q.reshape(tiles, tokens * heads, width), ((0, 0), (0, rows - tokens * heads), (0, 0))),
        cache,
    )  # fmt: skip
    if num_splits == 1:
        out = parts[0]
    else:
        # A row that sees nothing has -inf everywhere.
        peak = jnp.maximum(jnp.max(log_sum_exps, axis=0), -FLOAT_MAX)
        share = jnp.exp2(log_sum_exps - peak)
        share = share / jnp.maximum(jnp.sum(share, axis=0), jnp.finfo(jnp.float32).tiny)
        out = jnp.sum(share[..., None] * parts, axis=0).astype(q.dtype)
    return out[:, : tokens * heads].reshape(tiles, tokens, heads, value_width)


def _kernel(*refs, value_width, scale, num_splits, has_trees, interpret):
    """Attend with 64 rows of a tile to a part of its context.

    Args:
        refs: In HBM: pages in use [tiles, row blocks]; block tables [tiles, P]; with trees their first slots [tiles];
            limits [tiles, rows]; with trees masks [tiles, rows]; queries [tiles, rows, W]; cache [pages, S, Wc]; out:
            weighted means of values [splits, tiles, rows, value_width] and log2 of the sums of 2 ** score [splits,
            tiles, rows]. Then the scratch.
        value_width: Leading columns of a cache row that are values.
        scale: Factor on the scores, log2(e) included.
        num_splits: Parts of the context.
        has_trees: Whether rows have masks.
        interpret: Whether an interpreter runs this.
    """
    num_pages, tables, *refs = refs
    tree_start, *refs = refs if has_trees else (None, *refs)
    columns, refs = refs[: 1 + has_trees], refs[1 + has_trees :]
    q, cache, out, log_sum_exp, *scratch = refs
    queries, context, column_buffers, result_buffer, columns_filled, filled, emptied = scratch
    split, tile, row_block = (jax.lax.axis_index(name) for name in ("splits", "tiles", "rows"))
    warpgroup = jax.lax.axis_index("warpgroup")
    rows = pl.ds(row_block * WGMMA_ROWS, WGMMA_ROWS)
    page_size, width = cache.shape[1], q.shape[2]
    copied_rows = min(page_size, BLOCK_TOKENS)
    pages = num_pages[tile, row_block]
    blocks = (pages * page_size + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    first, end = blocks * split // num_splits, blocks * (split + 1) // num_splits

    @pl.when(warpgroup == 2)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        plgpu.copy_gmem_to_smem(q.at[tile, rows], queries, columns_filled)
        for column, target in zip(columns, column_buffers, strict=True):
            plgpu.copy_gmem_to_smem(column.at[tile, rows], target, columns_filled)

        @pl.loop(0, end - first)
        def _(step):
            stage = step % STAGES
            slots = [(first + step) * BLOCK_TOKENS + start for start in range(0, BLOCK_TOKENS, copied_rows)]
            # A block may end behind the last page in use, which is then read again.
            places = [(tables[tile, jnp.minimum(slot // page_size, pages - 1)], slot % page_size) for slot in slots]
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            for start, (page, offset) in zip(range(0, BLOCK_TOKENS, copied_rows), places, strict=True):
                plgpu.copy_gmem_to_smem(
                    cache.at[page, pl.ds(offset, copied_rows), pl.ds(0, width)],
                    context.at[stage, pl.ds(start, copied_rows)],
                    filled.at[stage],
                )

        @pl.loop(jnp.maximum(end - first - STAGES, 0), end - first)
        def _(step):
            plgpu.barrier_wait(emptied.at[step % STAGES])

    @pl.when(warpgroup < 2)
    def _attend():
        plgpu.set_max_registers(count_registers(2), action="increase")
        half = pl.ds(warpgroup * (value_width // 2), value_width // 2)
        plgpu.barrier_wait(columns_filled)
        place = jax.lax.broadcasted_iota(jnp.int32, (WGMMA_ROWS, BLOCK_TOKENS), 1)
        place = with_layout(place, LAYOUT, interpret)

        def spread(by_row, num_columns=BLOCK_TOKENS):
            return jax.lax.broadcast_in_dim(by_row, (WGMMA_ROWS, num_columns), (0,))

        def attend_block(step, state):
            total, peak, mass = state
            stage = step % STAGES
            plgpu.barrier_wait(filled.at[stage])
            scores = multiply_transposed(queries, context.at[stage], interpret) * scale
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
            total = total * spread(fade, value_width // 2)
            total = accumulate(total, weights.astype(jnp.bfloat16), context.at[stage, :, half], interpret)
            plgpu.barrier_arrive(emptied.at[stage])
            return total, new_peak, mass

        start = (
            with_layout(jnp.zeros((WGMMA_ROWS, value_width // 2), jnp.float32), LAYOUT, interpret),
            with_layout(jnp.full(WGMMA_ROWS, -FLOAT_MAX, jnp.float32), BY_ROW, interpret),
            with_layout(jnp.zeros(WGMMA_ROWS, jnp.float32), BY_ROW, interpret),
        )
        total, peak, mass = jax.lax.fori_loop(0, end - first, attend_block, start)
        # Rows that see nothing stay zero.
        total = total / spread(jnp.maximum(mass, jnp.finfo(jnp.float32).tiny), value_width // 2)
        out.at[split, tile, rows, half][...] = total.astype(out.dtype)

        @pl.when(warpgroup == 0)
        def _():
            result_buffer[...] = peak + jnp.log(mass) * log2(e)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_buffer, log_sum_exp.at[split, tile, rows])
            plgpu.wait_smem_to_gmem(0)
