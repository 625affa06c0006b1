"""Draws as one TPU kernel: the LM head streams through VMEM once per block of rows, logits never leave it.

The grid is (blocks of rows, tiles of the vocabulary). A step multiplies the block by the tile into scratch, then goes
over its rows eight at a time: noise, running winner and running sum of exponentials of each lane, so that nothing
crosses lanes inside; the 128 lanes combine afterwards as shards of the vocabulary do. Counted per logit are about 165
operations of the vector unit, 115 of them Threefry, and 2 x width of the matrix unit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tree_verify.noise import fold_in, gumbel
from kernels_pallas.tree_verify.partials import Partials, combine

LANES, SUBLANES = 128, 8
ROW_BLOCK = 256
"""Rows that share a pass over the head: 256 operations per byte of it in bfloat16, where v5e turns compute-bound."""
MAX_TILE = 1024
"""Most tokens of a tile: bounds the unrolled code, one vector register per value, eight rows and 128 tokens."""
TILE_BYTES = 4 << 20
"""Most bytes of a tile, unless 128 tokens are more; two are in VMEM at a time."""
FLOAT_MAX = 3.4028234663852886e38


def tree_verify_pallas_tpu(
    hidden, head, keys, positions, temperature, first_id, vocab_size, *, interpret=False, max_tile=None
):
    """See `tree_verify`.

    Args:
        hidden, head, keys, positions, temperature, first_id, vocab_size: See `tree_verify_xla`.
        interpret: As in `pl.pallas_call`; for tests.
        max_tile: Most tokens of a tile, a multiple of 128; None is MAX_TILE.
    """
    num_rows, width = hidden.shape
    vocab = head.shape[1]
    # 16 rows fill the sublanes of a register of bfloat16.
    row_block = min(ROW_BLOCK, _round_up(num_rows, 2 * SUBLANES))
    padded = _round_up(num_rows, row_block)
    fitting = TILE_BYTES // (width * head.dtype.itemsize) // LANES * LANES
    tile = min(max(fitting, LANES), max_tile or MAX_TILE, _round_up(vocab, LANES))
    is_greedy = temperature <= 0
    columns = (
        *fold_in(keys, positions),
        jnp.where(is_greedy, 1.0, temperature),
        jnp.where(is_greedy, 0.0, 1.0),
    )

    def pad(x):
        return jnp.pad(x, ((0, padded - num_rows), (0, 0)))

    by_row = lambda block_width: pl.BlockSpec((row_block, block_width), lambda i, j: (i, 0))  # noqa: E731
    out_types = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    buffers = 2 * (row_block * width * hidden.dtype.itemsize + width * tile * head.dtype.itemsize)
    small = 4 * row_block * (tile + 2 * 4 * LANES + 2 * len(out_types) * LANES)
    lanes = pl.pallas_call(
        partial(_kernel, vocab=vocab, tile=tile),
        grid=(padded // row_block, pl.cdiv(vocab, tile)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            by_row(width),
            pl.BlockSpec((width, tile), lambda i, j: (0, j)),
            *[by_row(1)] * len(columns),
        ],
        out_specs=[by_row(LANES)] * len(out_types),
        out_shape=[jax.ShapeDtypeStruct((padded, LANES), dtype) for dtype in out_types],
        scratch_shapes=[pltpu.VMEM((row_block, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=buffers + small + (8 << 20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=padded * vocab * (2 * width + 165),
            transcendentals=3 * padded * vocab,
            bytes_accessed=padded // row_block * head.nbytes + hidden.nbytes + 20 * padded * LANES,
        ),
        interpret=interpret,
        name="tree_verify",
    )(jnp.full(1, first_id, jnp.int32), pad(hidden), head, *(pad(column[:, None]) for column in columns))
    score, token_id, logit, peak, mass = (x[:num_rows].T for x in lanes)
    return combine(Partials(score, token_id, logit, peak + jnp.log(mass)))


def _kernel(
    first_id,
    hidden,
    head,
    key0,
    key1,
    divisor,
    noise_factor,
    score,
    token_id,
    logit,
    peak,
    mass,
    logits,
    *,
    vocab,
    tile,
):
    """Add one tile of the vocabulary to what the lanes of a block of rows hold.

    Args:
        first_id: [1] id of the head's first column in the whole vocabulary.
        hidden: [rows, width].
        head: [width, tile]; columns beyond `vocab` hold anything.
        key0, key1: [rows, 1] folded keys.
        divisor, noise_factor: [rows, 1]; 1 and 0 for greedy rows.
        score, token_id, logit: [rows, 128] winner of each lane so far.
        peak, mass: [rows, 128] largest logit of each lane, and sum of exp(logit - peak).
        logits: Scratch [rows, tile].
        vocab: Columns of the head.
        tile: Those of a tile.
    """
    tile_index = pl.program_id(1)

    @pl.when(tile_index == 0)
    def _():
        score[...] = jnp.full_like(score, -jnp.inf)
        token_id[...] = jnp.full_like(token_id, first_id[0])
        logit[...] = jnp.full_like(logit, -jnp.inf)
        peak[...] = jnp.full_like(peak, -FLOAT_MAX)
        mass[...] = jnp.zeros_like(mass)

    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    logits[...] = jnp.dot(hidden[...], head[...], preferred_element_type=jnp.float32, precision=precision)
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)

    def draw_rows(group, _):
        rows = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        best, best_id, best_logit = score[rows, :], token_id[rows, :], logit[rows, :]
        scaled = []
        for start in range(0, tile, LANES):
            index = tile_index * tile + start + lane
            x = jnp.where(index < vocab, logits[rows, start : start + LANES] / divisor[rows, :], -jnp.inf)
            ids = first_id[0] + index
            candidate = x + noise_factor[rows, :] * gumbel(key0[rows, :], key1[rows, :], ids)
            # A lane's ids grow, so the first of equals has the lowest.
            wins = candidate > best
            best = jnp.where(wins, candidate, best)
            best_id = jnp.where(wins, ids, best_id)
            best_logit = jnp.where(wins, x, best_logit)
            scaled.append(x)
        score[rows, :], token_id[rows, :], logit[rows, :] = best, best_id, best_logit
        old_peak = new_peak = peak[rows, :]
        for x in scaled:
            new_peak = jnp.maximum(new_peak, x)
        # Infinite logits would make inf - inf.
        new_peak = jnp.minimum(new_peak, FLOAT_MAX)
        total = mass[rows, :] * jnp.exp(old_peak - new_peak)
        for x in scaled:
            total += jnp.exp(x - new_peak)
        peak[rows, :], mass[rows, :] = new_peak, total
        return _

    jax.lax.fori_loop(0, logits.shape[0] // SUBLANES, draw_rows, None)


def _round_up(number, multiple):
    return -(-number // multiple) * multiple
