"""Expert MLP as two Hopper kernels in Mosaic GPU, gate/up with SiLU and then down, over tiles of one expert's tokens.

`plan_tiles` sorts the assignments by expert and pads each expert's run to tiles of 64 rows, what wgmma multiplies; XLA
gathers the tiles' tokens. A thread block has one tile and 128 columns, of gate and as many of up, over the whole depth,
so that nothing is carried between thread blocks. One warpgroup copies slabs of 64 of the depth, one multiplies. Thread
blocks of tiles that are not in use end at once; an expert without tokens is not read.

Float8. wgmma takes float8 in both operands or in none. So two more warpgroups make bfloat16 of the copied weights, half
of the columns each, in two buffers: while one is multiplied the other is filled. They multiply by the scale of the
128 x 128 block in float32 on the way, so that a weight is rounded to bfloat16 once, as `xla` rounds it. A slab of gate
and up is 16 KB, 800 cycles of a multiprocessor's share of an H200's bandwidth. Its 16,384 conversions, at four
instructions a pair and 64 of these a cycle, take 512, the product of 64 rows 512, and the 120 KB that go in and out
of shared memory 960, all beside each other.

Bytes. The weights of an expert with one tile, the usual case of decode, are read once; several tiles of an expert read
them at about the same time, from the L2 but once. Padding costs no weights, and at 64 rows a tile is far from being
bound by its products. Around them are the gathered tokens, hidden rows and outputs, at most (T K + 64 E) rows.

Gradients: none, and asking is refused by name; training uses `xla`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas._dispatch import check_served
from kernels_pallas._mosaic_gpu import SLAB, WGMMA_ROWS, divide_registers, slabs, upcast
from kernels_pallas.grouped_matmul.blocks import BLOCK
from kernels_pallas.grouped_matmul.layout import why_not_pallas_gpu
from kernels_pallas.grouped_matmul.xla import plan_tiles

COLUMNS = BLOCK
"""Of a matrix per thread block: 64 registers of float32 sums per thread, twice for gate and up; and one scale."""
SMEM_BYTES = 200 << 10
"""Shared memory for slabs; a thread block of a Hopper chip has 227 KB in all."""
UPCASTERS = COLUMNS // SLAB
"""Warpgroups that make bfloat16 of float8."""
UPCAST_BUFFERS = 2


def grouped_mlp_pallas_gpu(
    x, expert_ids, expert_weights, gate_up, down, gate_up_scale=None, down_scale=None, *, interpret=None
):
    """See `grouped_mlp`.

    Args:
        x: As there, bfloat16.
        expert_ids: As there.
        expert_weights: As there.
        gate_up: As there, bfloat16, or float8_e4m3fn with scales.
        down: As there, likewise.
        gate_up_scale: As there.
        down_scale: As there.
        interpret: `InterpretGPUParams` to run without a GPU; for tests.

    Returns:
        As there.

    Raises:
        KernelRefusedError: If the kernels cannot serve these shapes (`why_not_pallas_gpu`).
        ValueError: If a gradient is asked for.
    """
    check_served("grouped_mlp", "pallas_gpu", why_not_pallas_gpu(x, gate_up, down, gate_up_scale))

    @jax.custom_vjp
    def run(x, expert_weights, gate_up, down):
        tiles = plan_tiles(expert_ids, gate_up.shape[0], WGMMA_ROWS)
        plan = tiles.num_tiles.reshape(1).astype(jnp.int32), tiles.expert.astype(jnp.int32)
        hidden = _multiply_tiles(plan, x[tiles.token], gate_up, gate_up_scale, 2, "grouped_gate_up", interpret)
        slots = _multiply_tiles(plan, hidden, down, down_scale, 1, "grouped_down", interpret)
        # Slots of tiles that were not run were never written.
        chosen = slots.at[tiles.slot].get(mode="fill", fill_value=0).astype(jnp.float32)
        return jnp.einsum("tkm,tk->tm", chosen, expert_weights.astype(jnp.float32)).astype(x.dtype)

    def refuse(*_):
        raise ValueError("grouped_mlp: pallas_gpu has no gradient; name implementation='xla'")

    run.defvjp(refuse, refuse)
    return run(x, expert_weights, gate_up, down)


def _multiply_tiles(plan, rows, weights, scale, num_matrices, name, interpret):
    """Multiply every tile by its expert's matrix, or by gate and up and combine these.

    Args:
        plan: Tiles in use [1], and the expert of each [tiles].
        rows: [slots, depth].
        weights: [E, depth, columns of all matrices].
        scale: Of the weights' blocks, or None.
        num_matrices: 2 for gate and up, whose columns follow each other.
        name: Of the kernel.
        interpret: See `grouped_mlp_pallas_gpu`.

    Returns:
        [slots, columns of one matrix]; tiles not in use are not written.
    """
    width, is_float8 = weights.shape[2] // num_matrices, scale is not None
    slab_columns = num_matrices * COLUMNS
    upcast_bytes = is_float8 * UPCAST_BUFFERS * SLAB * slab_columns * 2
    stages = (SMEM_BYTES - upcast_bytes) // (SLAB * (WGMMA_ROWS * 2 + slab_columns * weights.dtype.itemsize))
    upcast_scratch = [
        [slabs((UPCAST_BUFFERS, SLAB, COLUMNS)) for _ in range(num_matrices)],
        plgpu.Barrier(num_arrivals=UPCASTERS, num_barriers=UPCAST_BUFFERS),
        plgpu.Barrier(num_barriers=UPCAST_BUFFERS),
    ]
    return plgpu.kernel(
        partial(_kernel, num_matrices=num_matrices, is_float8=is_float8, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype),
        scratch_types=[
            slabs((stages, WGMMA_ROWS, SLAB)),
            [slabs((stages, SLAB, COLUMNS), weights.dtype) for _ in range(num_matrices)],
            plgpu.Barrier(num_arrivals=1 + num_matrices, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            *(upcast_scratch if is_float8 else ()),
        ],
        grid=(width // COLUMNS, len(plan[1])),
        grid_names=("columns", "tiles"),
        num_threads=2 + is_float8 * UPCASTERS,
        thread_name="warpgroup",
        kernel_name=name,
        interpret=interpret,
    )(*plan, rows, weights, *((scale,) if is_float8 else ()))


def _kernel(num_tiles, experts, rows, weights, *refs, num_matrices, is_float8, interpret):
    """Multiply a tile by 128 columns of each of its expert's matrices; see `_multiply_tiles`.

    Args:
        num_tiles: As there.
        experts: As there.
        rows: As there.
        weights: As there.
        refs: Scales, if the weights are float8; what to write; then the scratch.
        num_matrices: As there.
        is_float8: Whether the weights are float8.
        interpret: As there.
    """
    scales, *refs = refs if is_float8 else (None, *refs)
    out, row_slabs, weight_slabs, filled, emptied, *upcast_scratch = refs
    upcast_slabs, upcasted, multiplied = upcast_scratch or (None, None, None)
    tile, column_block = jax.lax.axis_index("tiles"), jax.lax.axis_index("columns")
    warpgroup = jax.lax.axis_index("warpgroup")
    is_used, computing = tile < num_tiles[0], 1 + is_float8 * UPCASTERS
    of_tile = pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)
    depth_slabs, width, stages = rows.shape[1] // SLAB, out.shape[1], row_slabs.shape[0]

    def wait_for_last(barriers):
        """Wait for what nobody has waited for, so that no barrier ends halfway."""
        count = barriers.shape[0]

        @pl.loop(max(depth_slabs - count, 0), depth_slabs)
        def _(step):
            plgpu.barrier_wait(barriers.at[step % count])

    @pl.when(is_used & (warpgroup == 1))
    def _copy():
        divide_registers(computing, is_copying=True)
        expert = experts[tile]

        @pl.loop(0, depth_slabs)
        def _(step):
            stage, depth = step % stages, pl.ds(step * SLAB, SLAB)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            plgpu.copy_gmem_to_smem(rows.at[of_tile, depth], row_slabs.at[stage], filled.at[stage])
            for position, buffer in enumerate(weight_slabs):
                columns = pl.ds(position * width + column_block * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(weights.at[expert, depth, columns], buffer.at[stage], filled.at[stage])

        wait_for_last(emptied)

    if is_float8:

        @pl.when(is_used & (warpgroup > 1))
        def _upcast():
            divide_registers(computing, is_copying=False)
            expert, columns = experts[tile], pl.ds((warpgroup - 2) * SLAB, SLAB)

            @pl.loop(0, depth_slabs)
            def _(step):
                # The stage is given back by who multiplies, behind both of these warpgroups.
                stage, buffer = step % stages, step % UPCAST_BUFFERS
                block = step * SLAB // BLOCK
                factors = [scales[expert, block, n * (width // BLOCK) + column_block] for n in range(num_matrices)]
                plgpu.barrier_wait(filled.at[stage])
                pl.when(step >= UPCAST_BUFFERS)(lambda: plgpu.barrier_wait(multiplied.at[buffer]))
                for source, target, factor in zip(weight_slabs, upcast_slabs, factors, strict=True):
                    upcast(source.at[stage, :, columns], target.at[buffer, :, columns], interpret, factor)
                plgpu.commit_smem()
                plgpu.barrier_arrive(upcasted.at[buffer])

            wait_for_last(multiplied)

    @pl.when(is_used & (warpgroup == 0))
    def _multiply():
        divide_registers(computing, is_copying=False)

        def give_back(step):
            plgpu.barrier_arrive(emptied.at[step % stages])
            if is_float8:
                plgpu.barrier_arrive(multiplied.at[step % UPCAST_BUFFERS])

        def multiply(*sums):
            @pl.loop(0, depth_slabs)
            def _(step):
                stage, buffer = step % stages, step % UPCAST_BUFFERS
                plgpu.barrier_wait(filled.at[stage])
                if is_float8:
                    plgpu.barrier_wait(upcasted.at[buffer])
                    factors = [slab.at[buffer] for slab in upcast_slabs]
                else:
                    factors = [slab.at[stage] for slab in weight_slabs]
                for total, factor in zip(sums, factors, strict=True):
                    plgpu.wgmma(total, row_slabs.at[stage], factor)
                # Those of this step may go on; those of the one before have read their slabs.
                plgpu.wgmma_wait(num_matrices)
                pl.when(step > 0)(lambda: give_back(step - 1))

            return [total[...] for total in sums]

        accumulators = [plgpu.ACC((WGMMA_ROWS, COLUMNS), jnp.float32) for _ in range(num_matrices)]
        gate, *up = pl.run_scoped(multiply, *accumulators)
        give_back(depth_slabs - 1)
        result = gate / (1 + jnp.exp(-gate)) * up[0] if up else gate
        out.at[of_tile, pl.ds(column_block * COLUMNS, COLUMNS)][...] = result.astype(out.dtype)
