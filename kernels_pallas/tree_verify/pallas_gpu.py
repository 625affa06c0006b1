"""Draws as one Hopper kernel in Mosaic GPU: the LM head streams through shared memory, logits stay in registers.

The grid is (blocks of rows, thread blocks). A thread block takes every n-th tile of 128 tokens for one block of up to
256 rows, and keeps the rows' winners and sums of exponentials; the thread blocks' results then combine as shards of the
vocabulary do. Blocks of rows that take the same tile do so at the same time, so that the second finds it in the L2.

One warpgroup copies slabs, 64 columns of the hidden states and as many rows of the head, and runs ahead into the next
tile while the others draw from this one. Each of those multiplies 64 rows by the tile with wgmma, then goes over their
logits a few tokens at a time.

Only bfloat16: wgmma would round float32 to TF32. Only Hopper: other chips have no wgmma.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas._dispatch import check_served
from kernels_pallas._mosaic_gpu import (
    BY_ROW,
    LAYOUT,
    MULTIPROCESSORS,
    SLAB,
    WGMMA_ROWS,
    divide_registers,
    slabs,
    with_layout,
)
from kernels_pallas.tree_verify.layout import why_not_pallas_gpu
from kernels_pallas.tree_verify.noise import fold_in, gumbel
from kernels_pallas.tree_verify.partials import Partials, combine

MAX_WARPGROUPS = 4
"""That multiply; each has 64 rows."""
TILE = 128
"""Tokens of a tile: 64 registers of float32 logits per thread."""
SMEM_BYTES = 200 << 10
"""Shared memory for slabs; a thread block of a Hopper chip has 227 KB in all."""
FLOAT_MAX = 3.4028234663852886e38


def tree_verify_pallas_gpu(
    hidden, head, keys, positions, temperature, first_id, vocab_size, *, interpret=None, num_blocks=None, draw_columns=8
):
    """See `tree_verify`.

    Args:
        hidden, head, keys, positions, temperature, first_id, vocab_size: See `tree_verify_xla`.
        interpret: `InterpretGPUParams` to run without a GPU; for tests.
        num_blocks: Thread blocks that share the vocabulary; None fills the chip.
        draw_columns: Tokens drawn from at a time. 8 are the fewest that a layout of registers holds, and bound what
            noise takes of them; tests take more, whose unrolled code is shorter.

    Raises:
        KernelRefusedError: If the kernel cannot serve these shapes.
    """
    check_served("tree_verify", "pallas_gpu", why_not_pallas_gpu(hidden, head))
    num_rows, vocab = hidden.shape[0], head.shape[1]
    warpgroups = min(-(-num_rows // WGMMA_ROWS), MAX_WARPGROUPS)
    row_block = warpgroups * WGMMA_ROWS
    row_blocks = -(-num_rows // row_block)
    num_tiles = -(-vocab // TILE)
    num_blocks = min(num_blocks or max(MULTIPROCESSORS // row_blocks, 1), num_tiles)
    stages = SMEM_BYTES // ((row_block + TILE) * SLAB * 2)
    is_greedy = temperature <= 0
    columns = (
        *fold_in(keys, positions),
        jnp.where(is_greedy, 1.0, temperature),
        jnp.where(is_greedy, 0.0, 1.0),
    )
    padding = row_blocks * row_block - num_rows
    out_types = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    parts = plgpu.kernel(
        partial(
            _kernel,
            warpgroups=warpgroups,
            stages=stages,
            num_blocks=num_blocks,
            draw_columns=draw_columns,
            interpret=interpret,
        ),
        out_type=[jax.ShapeDtypeStruct((num_blocks, row_blocks * row_block), dtype) for dtype in out_types],
        scratch_types=[
            slabs((stages, row_block, SLAB)),
            slabs((stages, SLAB, TILE)),
            [plgpu.SMEM((row_block,), column.dtype) for column in columns],
            [plgpu.SMEM((row_block,), dtype) for dtype in out_types],
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=len(columns)),
        ],
        grid=(row_blocks, num_blocks),
        grid_names=("rows", "tiles"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="tree_verify",
        interpret=interpret,
    )(
        jnp.full(1, first_id, jnp.int32),
        jnp.pad(hidden, ((0, padding), (0, 0))),
        head,
        *(jnp.pad(column, (0, padding)) for column in columns),
    )
    score, token_id, logit, peak, mass = (x[:, :num_rows] for x in parts)
    return combine(Partials(score, token_id, logit, peak + jnp.log(mass)))


def _kernel(*refs, warpgroups, stages, num_blocks, draw_columns, interpret):
    """Draw for a block of rows from every `num_blocks`-th tile.

    Args:
        refs: In HBM: [1] id of the head's first column in the whole vocabulary; hidden [rows, width]; head [width,
            vocab]; folded keys (2), divisor and noise factor [rows]; out: winner's score, id and logit, largest logit,
            sum of exp(logit - largest) [num_blocks, rows]. Then the scratch.
        warpgroups: Those that multiply.
        stages: Slabs in shared memory.
        num_blocks: Thread blocks along the vocabulary.
        draw_columns: Tokens drawn from at a time.
        interpret: Whether an interpreter runs this.
    """
    first_id, hidden, head, *refs = refs
    columns, refs = refs[:4], refs[4:]
    outs, scratch = refs[:5], refs[5:]
    hidden_slabs, head_slabs, column_buffers, state, filled, emptied, columns_filled = scratch
    warpgroup, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("tiles")
    row_block = warpgroups * WGMMA_ROWS
    block_rows = pl.ds(jax.lax.axis_index("rows") * row_block, row_block)
    width, vocab = head.shape
    depth_slabs = width // SLAB
    num_steps = (-(-vocab // TILE) - block + num_blocks - 1) // num_blocks * depth_slabs

    @pl.when(warpgroup == warpgroups)
    def _copy():
        divide_registers(warpgroups, is_copying=True)
        for column, target in zip(columns, column_buffers, strict=True):
            plgpu.copy_gmem_to_smem(column.at[block_rows], target, columns_filled)

        @pl.loop(0, num_steps)
        def _(step):
            stage = step % stages
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            depth = pl.ds(step % depth_slabs * SLAB, SLAB)
            tokens = pl.ds((block + step // depth_slabs * num_blocks) * TILE, TILE)
            plgpu.copy_gmem_to_smem(hidden.at[block_rows, depth], hidden_slabs.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(head.at[depth, tokens], head_slabs.at[stage], filled.at[stage])

        @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
        def _(step):
            plgpu.barrier_wait(emptied.at[step % stages])

    @pl.when(warpgroup < warpgroups)
    def _draw():
        divide_registers(warpgroups, is_copying=False)
        rows = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)
        plgpu.barrier_wait(columns_filled)
        column = jax.lax.broadcasted_iota(jnp.int32, (WGMMA_ROWS, draw_columns), 1)
        column = with_layout(column, LAYOUT, interpret)
        first = first_id[0]
        for buffer, value in zip(state, (-jnp.inf, first, -jnp.inf, -FLOAT_MAX, 0), strict=True):
            buffer.at[rows][...] = with_layout(jnp.full(WGMMA_ROWS, value, buffer.dtype), BY_ROW, interpret)

        def load(buffer):
            return with_layout(buffer.at[rows][...], BY_ROW, interpret)

        def spread(by_row):
            return jax.lax.broadcast_in_dim(by_row, (WGMMA_ROWS, draw_columns), (0,))

        @pl.loop(0, num_steps // depth_slabs)
        def _(trip):
            def multiply(logits):
                @pl.loop(0, depth_slabs)
                def _(slab):
                    step = trip * depth_slabs + slab
                    plgpu.barrier_wait(filled.at[step % stages])
                    plgpu.wgmma(logits, hidden_slabs.at[step % stages, rows], head_slabs.at[step % stages])
                    plgpu.wgmma_wait(1)
                    pl.when(slab > 0)(lambda: plgpu.barrier_arrive(emptied.at[(step - 1) % stages]))

                return logits[...]

            logits = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, TILE), jnp.float32))
            plgpu.barrier_arrive(emptied.at[((trip + 1) * depth_slabs - 1) % stages])
            # What is known of the rows waits in shared memory: registers are scarce while a product accumulates.
            key0, key1, divisor, noise_factor = (spread(load(buffer)) for buffer in column_buffers)
            score, token_id, logit, peak, mass = (load(buffer) for buffer in state)
            for start in range(0, TILE, draw_columns):
                index = (block + trip * num_blocks) * TILE + start + column
                x = logits[:, start : start + draw_columns] / divisor
                x = jnp.where(index < vocab, x, -jnp.inf)
                ids = first + index
                candidate = x + noise_factor * gumbel(key0, key1, ids)
                best = jnp.max(candidate, axis=1)
                best_id = jnp.min(jnp.where(candidate == spread(best), ids, jnp.iinfo(jnp.int32).max), axis=1)
                best_logit = jnp.max(jnp.where(ids == spread(best_id), x, -jnp.inf), axis=1)
                # A thread block's ids grow, so the first of equals has the lowest.
                wins = best > score
                score = jnp.where(wins, best, score)
                token_id = jnp.where(wins, best_id, token_id)
                logit = jnp.where(wins, best_logit, logit)
                # Infinite logits would make inf - inf.
                new_peak = jnp.minimum(jnp.maximum(peak, jnp.max(x, axis=1)), FLOAT_MAX)
                mass = mass * jnp.exp(peak - new_peak) + jnp.sum(jnp.exp(x - spread(new_peak)), axis=1)
                peak = new_peak
            for buffer, value in zip(state, (score, token_id, logit, peak, mass), strict=True):
                buffer.at[rows][...] = value

        plgpu.commit_smem()
        place = pl.ds(jax.lax.axis_index("rows") * row_block + warpgroup * WGMMA_ROWS, WGMMA_ROWS)
        for buffer, out in zip(state, outs, strict=True):
            plgpu.copy_smem_to_gmem(buffer.at[rows], out.at[block, place])
        plgpu.wait_smem_to_gmem(0)
