"""Expert MLP for TPU: two Mosaic kernels, gate/up with SiLU and then down, that read each active expert once.

Layout. `plan_tiles` sorts the assignments by expert and pads each expert's run to whole tiles of rows; XLA gathers the
tiles' tokens. A weight block is a whole column strip: all M rows of `columns` gate and as many up columns, or all F
rows of `columns` down columns, so that a product is finished in one step and nothing is carried from step to step.

Order. The grid is (cores, tiles in use, blocks of a core). The tiles of one expert walk its blocks together: block 0
for each of its tiles, block 1 for each, ... Consecutive steps that name the same block do not fetch it again, so every
block of an expert with tokens is read once per call, however many tiles the expert has, and no block of another expert
is named at all. An expert with one tile, the usual case of decode, reads its tokens once too; with more, the tiles'
tokens are read again for every block. The second grid bound is a run-time value, so tiles without tokens cost nothing.

Bytes. Weights: 3 M F x itemsize per active expert (Moonlight 17.3 MB, Kimi-K2 88 MB, 44 in float8). Around them, the
gathered tokens, hidden rows and outputs of the padded tiles: at most (T K + E tile) rows, 16 a tile in decode.

Cores. On chips whose two cores are one device (v4, v5p) each core takes half of every expert's blocks.

Float8. A step multiplies by each 128 x 128 block in the tokens' own type, in which float8 is exact, and scales the
float32 product: weights are never rounded a second time, and half the bytes are read.

VMEM (`count_vmem_bytes`, given to the compiler as the limit) is at most 13 MiB for bfloat16 and float8 at the shapes of
`arg_specs`, of the 16 MiB that XLA gives a kernel unasked.

Gradients: none, and asking is refused by name; training uses `xla`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._dispatch import check_served
from kernels_pallas.grouped_matmul.blocks import BLOCK
from kernels_pallas.grouped_matmul.layout import LANES, why_not_pallas_tpu
from kernels_pallas.grouped_matmul.xla import Tiles, plan_tiles

MIN_ROWS, MAX_ROWS = 16, 128
"""Rows of a tile: 16 fill the sublanes of a register of bfloat16, 128 the depth of a matrix unit."""
BLOCK_BYTES = 4 * 2**20
"""Most bytes of weights in a step, unless 128 columns are more; two steps' are in VMEM at a time."""
SPILL_BYTES = 2 * 2**20
"""What the compiler wants besides; 1.5 MiB is the most seen, on v5p with 128 rows of Kimi-K2."""


def choose_tile_rows(num_tokens: int, experts_per_token: int, num_experts: int) -> int:
    """Choose the rows of a tile: the power of two from twice an expert's fair share up, so that one mostly does.

    Padding costs no reads of weights and, below 128 rows, hardly any time of the matrix unit.
    """
    share = num_tokens * experts_per_token // num_experts
    return min(max(MIN_ROWS, 1 << (2 * share - 1).bit_length() if share else 0), MAX_ROWS)


def choose_columns(depth: int, width: int, itemsize: int, num_cores: int) -> int:
    """Choose the columns of a weight block.

    Args:
        depth: Rows of the block, over all the matrices that a step reads.
        width: Columns of the matrix, whole lanes.
        itemsize: Bytes of a weight.
        num_cores: Cores that share the blocks.

    Returns:
        A divisor of `width`, whole lanes: the largest within `BLOCK_BYTES` that shares evenly if there is one, else the
        largest within; else 128.
    """
    lanes = width // LANES
    divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
    fitting = [n for n in divisors if depth * n * LANES * itemsize <= BLOCK_BYTES] or [1]
    even = [n for n in fitting if lanes // n % num_cores == 0]
    return max(even or fitting) * LANES


def count_vmem_bytes(
    rows: int, depth: int, columns: int, num_matrices: int, row_itemsize: int, weight_itemsize: int
) -> int:
    """Count the VMEM of one kernel.

    Args:
        rows: Rows of a tile.
        depth: Columns of its rows.
        columns: Columns of a weight block.
        num_matrices: 2 for gate and up, 1 for down.
        row_itemsize: Bytes of an element of the rows and of the result.
        weight_itemsize: Bytes of a weight.

    Returns:
        Bytes: rows, weights and results twice (pipelined), products in float32, room to spill.
    """
    rows_in = 2 * rows * depth * row_itemsize
    weights = 2 * num_matrices * depth * columns * weight_itemsize
    results = 2 * rows * columns * row_itemsize + (num_matrices + 1) * rows * columns * 4
    parts = 0
    if row_itemsize == 4:  # A product of float32 is one of three bfloat16 parts of each operand.
        parts = 3 * 2 * (rows * depth + (depth * columns if weight_itemsize == 4 else BLOCK * BLOCK))
    return rows_in + weights + results + parts + SPILL_BYTES


def grouped_mlp_pallas_tpu(
    x,
    expert_ids,
    expert_weights,
    gate_up,
    down,
    gate_up_scale=None,
    down_scale=None,
    *,
    interpret=False,
    tile_rows=None,
    num_cores=None,
    vmem_limit_bytes=None,
):
    """See `grouped_mlp`.

    Args:
        x: As there.
        expert_ids: As there.
        expert_weights: As there.
        gate_up: As there.
        down: As there.
        gate_up_scale: As there.
        down_scale: As there.
        interpret: What `pallas_call` takes: True, or `pltpu.InterpretParams`, to run without a TPU.
        tile_rows: Rows of a tile, a multiple of 16; None chooses.
        num_cores: 1 or 2 cores that share the blocks; None asks the device.
        vmem_limit_bytes: VMEM that each kernel may use; None = what it is counted to need.

    Returns:
        As there.

    Raises:
        KernelRefusedError: If the kernels cannot serve these shapes (`why_not_pallas_tpu`).
        ValueError: If a gradient is asked for.
    """
    check_served("grouped_mlp", "pallas_tpu", why_not_pallas_tpu(x, gate_up, down, gate_up_scale))
    num_experts = gate_up.shape[0]
    if num_cores is None:
        num_cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    rows = tile_rows or choose_tile_rows(*expert_ids.shape, num_experts)
    options = {"num_cores": num_cores, "interpret": interpret, "vmem_limit_bytes": vmem_limit_bytes}

    @jax.custom_vjp
    def run(x, expert_weights, *experts):
        gate_up, down, gate_up_scale, down_scale = experts
        tiles = plan_tiles(expert_ids, num_experts, rows)
        plan = _plan_steps(tiles, num_experts)
        hidden = _multiply(plan, x[tiles.token], (gate_up, gate_up), gate_up_scale, "grouped_gate_up", **options)
        slots = _multiply(plan, hidden, (down,), down_scale, "grouped_down", **options)
        # Slots of tiles that were not run were never written.
        chosen = slots.at[tiles.slot].get(mode="fill", fill_value=0).astype(jnp.float32)
        return jnp.einsum("tkm,tk->tm", chosen, expert_weights.astype(jnp.float32)).astype(x.dtype)

    def refuse(*_):
        raise ValueError("grouped_mlp: pallas_tpu has no gradient; name implementation='xla'")

    run.defvjp(refuse, refuse)
    return run(x, expert_weights, gate_up, down, gate_up_scale, down_scale)


def _plan_steps(tiles: Tiles, num_experts: int) -> tuple[jax.Array, ...]:
    """Lay out the steps for scalar memory.

    Returns:
        Tiles to run; then of every tile its expert, the first tile of the expert, and how many the expert has. With no
        assignment at all one tile runs, for nobody: a grid of no steps is not known to be safe.
    """
    first = jnp.sum(tiles.expert[:, None] > tiles.expert, axis=1)
    count = jnp.sum(tiles.expert[:, None] == tiles.expert, axis=1)
    expert = jnp.minimum(tiles.expert, num_experts - 1)
    return jnp.maximum(tiles.num_tiles, 1), *(field.astype(jnp.int32) for field in (expert, first, count))


def locate_step(tile, index, num_blocks, first, count):
    """Say which tile meets which block in a step.

    Args:
        tile: Second coordinate of the grid.
        index: Third coordinate plus those of the cores before, below `num_blocks`.
        num_blocks: Blocks that this core walks.
        first: First tile of the expert that `tile` belongs to.
        count: Tiles of that expert.

    Returns:
        The tile, and the block: of the expert's count x num_blocks steps, count after count meet one block.
    """
    step = (tile - first) * num_blocks + index
    return first + jax.lax.rem(step, count), jax.lax.div(step, count)


def _multiply(plan, rows_in, matrices, scale, name, *, num_cores, interpret, vmem_limit_bytes):
    """Multiply every tile by its expert's matrix, or by gate and up and combine these.

    Args:
        plan: See `_plan_steps`.
        rows_in: [slots, depth].
        matrices: One array [E, depth, width]; or twice that of gate and up, whose columns follow each other.
        scale: Scales of the matrices, or None.
        name: Of the kernel.
        num_cores: See `grouped_mlp_pallas_tpu`.
        interpret: As there.
        vmem_limit_bytes: As there.

    Returns:
        [slots, width], or half that for gate and up; tiles not in use are not written.
    """
    num_tiles, *tables = plan
    slots, depth = rows_in.shape
    rows = slots // len(tables[0])
    num_experts = matrices[0].shape[0]
    width = matrices[0].shape[2] // len(matrices)
    itemsize = matrices[0].dtype.itemsize
    columns = choose_columns(depth * len(matrices), width, itemsize, num_cores)
    num_blocks = width // columns
    num_cores = min(num_cores, num_blocks)
    per_core = pl.cdiv(num_blocks, num_cores)

    def locate(core, tile, index, expert, first, count):
        at_tile, block = locate_step(tile, index, per_core, first[tile], count[tile])
        # The last core may have fewer blocks, and repeats its last one.
        return at_tile, expert[tile], jnp.minimum(core * per_core + block, num_blocks - 1)

    def of_rows(*at):
        return locate(*at)[0], 0

    def of_result(*at):
        tile, _, block = locate(*at)
        return tile, block

    def of_matrix(offset, *at):
        _, expert, block = locate(*at)
        return expert, 0, offset + block

    in_specs = [pl.BlockSpec((rows, depth), of_rows)]
    in_specs += [
        pl.BlockSpec((1, depth, columns), partial(of_matrix, position * num_blocks))
        for position in range(len(matrices))
    ]
    operands = [rows_in, *matrices]
    if scale is not None:
        in_specs.append(
            pl.BlockSpec((1, *scale.shape[1:]), lambda *at: (locate(*at)[1], 0, 0), memory_space=pltpu.SMEM)
        )
        operands.append(scale)
    if vmem_limit_bytes is None:
        vmem_limit_bytes = count_vmem_bytes(rows, depth, columns, len(matrices), rows_in.dtype.itemsize, itemsize)
    return pl.pallas_call(
        partial(_kernel, num_matrices=len(matrices), per_core=per_core, num_blocks=num_blocks),
        out_shape=jax.ShapeDtypeStruct((slots, width), rows_in.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(num_cores, num_tiles, per_core),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((rows, columns), of_result),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(  # Of every tile in use and all experts active; known at run time only.
            flops=2 * slots * depth * width * len(matrices),
            bytes_accessed=num_experts * depth * width * len(matrices) * itemsize
            + slots * (depth + width) * rows_in.dtype.itemsize,
            transcendentals=slots * width if len(matrices) > 1 else 0,
        ),
        interpret=interpret,
        name=name,
    )(*tables, *operands)


def _kernel(expert_ref, first_ref, count_ref, rows_ref, *refs, num_matrices, per_core, num_blocks):
    """One step: a tile times one block of columns."""
    matrices, (*scale, out_ref) = refs[:num_matrices], refs[num_matrices:]
    if not scale:
        products = [_dot(rows_ref[...], matrix[0]) for matrix in matrices]
    else:
        tile = pl.program_id(1)
        _, block = locate_step(tile, pl.program_id(2), per_core, first_ref[tile], count_ref[tile])
        block = jnp.minimum(pl.program_id(0) * per_core + block, num_blocks - 1)
        products = _dot_scaled(rows_ref, matrices, scale[0], block, num_blocks)
    result = products[0] if num_matrices == 1 else jax.nn.silu(products[0]) * products[1]
    out_ref[...] = result.astype(out_ref.dtype)


def _dot_scaled(rows_ref, matrices, scale_ref, block, num_blocks):
    """Products with block `block` of quantised matrices, whose scales follow each other in the rows of `scale_ref`."""
    rows, (_, depth, columns) = rows_ref.shape[0], matrices[0].shape
    strips = [(position, strip) for position in range(len(matrices)) for strip in range(columns // BLOCK)]

    def add_chunk(chunk, totals):
        at = pl.ds(pl.multiple_of(chunk * BLOCK, BLOCK), BLOCK)
        chunk_rows = rows_ref[:, at]
        sums = []
        for total, (position, strip) in zip(totals, strips, strict=True):
            weights = matrices[position][0, at, strip * BLOCK : (strip + 1) * BLOCK].astype(rows_ref.dtype)
            column = (position * num_blocks + block) * (columns // BLOCK) + strip
            sums.append(total + _dot(chunk_rows, weights) * scale_ref[0, chunk, column])
        return sums

    totals = jax.lax.fori_loop(0, depth // BLOCK, add_chunk, [jnp.zeros((rows, BLOCK), jnp.float32)] * len(strips))
    per_matrix = columns // BLOCK
    return [jnp.concatenate(totals[i : i + per_matrix], axis=1) for i in range(0, len(totals), per_matrix)]


def _dot(left, right):
    """Product in float32; float32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)
