"""Expert MLP as two Hopper kernels in Mosaic GPU, gate/up with SiLU and then down, over tiles of one expert's tokens.

`plan_tiles` sorts the assignments by expert and pads each expert's run to tiles of 64 rows, what wgmma multiplies; XLA
gathers the tiles' tokens. A thread block has one tile and 128 columns, of gate and as many of up, over the whole depth,
so that nothing is carried between thread blocks. One warpgroup copies slabs of 64 of the depth, one multiplies. Thread
blocks of tiles that are not in use end at once; an expert without tokens is not read.

Bytes. The weights of an expert with one tile, the usual case of decode, are read once; several tiles of an expert read
them at about the same time, from the L2 but once. Padding costs no weights, and at 64 rows a tile is far from being
bound by its products. Around them are the gathered tokens, hidden rows and outputs, at most (T K + 64 E) rows.

Not covered: float8 experts. Gradients: none, and asking is refused by name; training uses `xla`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas._mosaic_gpu import SLAB, WGMMA_ROWS, slabs
from kernels_pallas.grouped_matmul.layout import why_not_pallas_gpu
from kernels_pallas.grouped_matmul.xla import plan_tiles

COLUMNS = 128
"""Of a matrix per thread block: 64 registers of float32 sums per thread, twice for gate and up."""
SMEM_BYTES = 200 << 10
"""Shared memory for slabs; a thread block of a Hopper chip has 227 KB in all."""


def grouped_mlp_pallas_gpu(
    x, expert_ids, expert_weights, gate_up, down, gate_up_scale=None, down_scale=None, *, interpret=None
):
    """See `grouped_mlp`.

    Args:
        x: As there, bfloat16.
        expert_ids: As there.
        expert_weights: As there.
        gate_up: As there, bfloat16.
        down: As there, bfloat16.
        gate_up_scale: None; anything else is refused.
        down_scale: None.
        interpret: `InterpretGPUParams` to run without a GPU; for tests.

    Returns:
        As there.

    Raises:
        ValueError: If the kernels cannot serve these shapes (`why_not_pallas_gpu`), or a gradient is asked for.
    """
    if (reason := why_not_pallas_gpu(x, gate_up, down, gate_up_scale)) is not None:
        raise ValueError(f"grouped_mlp: pallas_gpu cannot serve this call: {reason}")

    @jax.custom_vjp
    def run(x, expert_weights, gate_up, down):
        tiles = plan_tiles(expert_ids, gate_up.shape[0], WGMMA_ROWS)
        plan = tiles.num_tiles.reshape(1).astype(jnp.int32), tiles.expert.astype(jnp.int32)
        hidden = _multiply(plan, x[tiles.token], gate_up, 2, "grouped_gate_up", interpret)
        slots = _multiply(plan, hidden, down, 1, "grouped_down", interpret)
        # Slots of tiles that were not run were never written.
        chosen = slots.at[tiles.slot].get(mode="fill", fill_value=0).astype(jnp.float32)
        return jnp.einsum("tkm,tk->tm", chosen, expert_weights.astype(jnp.float32)).astype(x.dtype)

    def refuse(*_):
        raise ValueError("grouped_mlp: pallas_gpu has no gradient; name implementation='xla'")

    run.defvjp(refuse, refuse)
    return run(x, expert_weights, gate_up, down)


def _multiply(plan, rows, weights, num_matrices, name, interpret):
    """Multiply every tile by its expert's matrix, or by gate and up and combine these.

    Args:
        plan: Tiles in use [1], and the expert of each [tiles].
        rows: [slots, depth].
        weights: [E, depth, columns of all matrices].
        num_matrices: 2 for gate and up, whose columns follow each other.
        name: Of the kernel.
        interpret: See `grouped_mlp_pallas_gpu`.

    Returns:
        [slots, columns of one matrix]; tiles not in use are not written.
    """
    width = weights.shape[2] // num_matrices
    stages = SMEM_BYTES // ((WGMMA_ROWS + num_matrices * COLUMNS) * SLAB * 2)
    return plgpu.kernel(
        partial(_kernel, num_matrices=num_matrices, stages=stages),
        out_type=jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype),
        scratch_types=[
            slabs((stages, WGMMA_ROWS, SLAB)),
            [slabs((stages, SLAB, COLUMNS)) for _ in range(num_matrices)],
            plgpu.Barrier(num_arrivals=1 + num_matrices, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(width // COLUMNS, len(plan[1])),
        grid_names=("columns", "tiles"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name=name,
        interpret=interpret,
    )(*plan, rows, weights)


def _kernel(num_tiles, experts, rows, weights, out, row_slabs, weight_slabs, filled, emptied, *, num_matrices, stages):
    """Multiply a tile by 128 columns of each of its expert's matrices; see `_multiply`."""
    tile, column_block = jax.lax.axis_index("tiles"), jax.lax.axis_index("columns")
    warpgroup = jax.lax.axis_index("warpgroup")
    is_used = tile < num_tiles[0]
    of_tile = pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)
    depth_slabs, width = rows.shape[1] // SLAB, out.shape[1]

    @pl.when(is_used & (warpgroup == 1))
    def _copy():
        expert = experts[tile]

        @pl.loop(0, depth_slabs)
        def _(step):
            stage, depth = step % stages, pl.ds(step * SLAB, SLAB)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            plgpu.copy_gmem_to_smem(rows.at[of_tile, depth], row_slabs.at[stage], filled.at[stage])
            for position, buffer in enumerate(weight_slabs):
                columns = pl.ds(position * width + column_block * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(weights.at[expert, depth, columns], buffer.at[stage], filled.at[stage])

        @pl.loop(max(depth_slabs - stages, 0), depth_slabs)
        def _(step):
            plgpu.barrier_wait(emptied.at[step % stages])

    @pl.when(is_used & (warpgroup == 0))
    def _multiply():
        def multiply(*sums):
            @pl.loop(0, depth_slabs)
            def _(step):
                stage = step % stages
                plgpu.barrier_wait(filled.at[stage])
                for total, buffer in zip(sums, weight_slabs, strict=True):
                    plgpu.wgmma(total, row_slabs.at[stage], buffer.at[stage])
                # Those of this step may go on; those of the one before have read their slabs.
                plgpu.wgmma_wait(num_matrices)
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(emptied.at[(step - 1) % stages]))

            return [total[...] for total in sums]

        accumulators = [plgpu.ACC((WGMMA_ROWS, COLUMNS), jnp.float32) for _ in range(num_matrices)]
        gate, *up = pl.run_scoped(multiply, *accumulators)
        plgpu.barrier_arrive(emptied.at[(depth_slabs - 1) % stages])
        result = gate / (1 + jnp.exp(-gate)) * up[0] if up else gate
        out.at[of_tile, pl.ds(column_block * COLUMNS, COLUMNS)][...] = result.astype(out.dtype)
