"""Paged latent attention for TPU: one Mosaic kernel for decode, tree verification and prompt slices.

Layout. The cache stays in HBM as it is, [pages, S, W], W a multiple of 128 lanes: 640 for 512 latent + 64 rope + 64
of padding, which registers hold anyway. At 576 XLA stores the array with the pages as lanes, which pads nothing, and
copies all of it at every call (seen in compiled programs); so the engine allocates what `pad_row_width` says, queries
are padded here, and `why_not_pallas_tpu` refuses anything else. A page is one contiguous DMA, 80 KB for 64 bfloat16
rows. Values are the first 512 columns of the same rows, so each row is read once. S must fill whole registers: a
multiple of 8 rows (float32) or 16 (bfloat16). Small pages make small DMAs: 64 rows are better than 16.

Work. A tile of Tq query tokens x H heads is one matrix of R = Tq x H rows, cut into tiles of at most `MAX_ROWS`. The
grid walks the tiles; inside, a loop walks the blocks of the tile's context that hold anything visible, so that cost
follows each request's own context. Pages go into one of two buffers while the other is computed on, and the last block
of a tile already fetches the first block of the next tile: the fetch pipeline never drains between tiles. Softmax is
online and in float32; products take the operands in their own type (float32 at full precision).

Cores. On chips whose two cores are one device (v4, v5p) the grid has an outer parallel dimension of 2: with many tiles
each core takes half of them, and with few (`num_splits`) each takes half of every tile's context; partial results are
then combined in XLA by their log-sum-exp. On one-core devices a split would only add work: a single tile's pages
already follow each other without a gap.

VMEM (`count_vmem_bytes`, given to the compiler as the limit): queries and outputs twice (pipelined), two blocks of
pages, accumulator, maxima and sums, scores and weighted values of one block in float32, and half a MiB for what the
compiler spills. The largest bfloat16 case, 1024 rows and 256 tokens a block: 2.5 + 2 + 0.6 + 3 + 3 + 0.5 = 11.6 MiB, of
the 16 MiB that XLA gives a kernel unasked. 16 rows, 512 tokens: 1.9 MiB.

Not covered: fp8 caches. The cache must be finite: weights of rows that nobody sees are 0, and 0 x NaN is NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mla_attention.layout import LANES, why_not_pallas_tpu
from kernels_pallas.mla_attention.mask import MASK_BITS

MAX_ROWS = 1024
"""Most (token, head) rows that attend together: at 1024 x 2 x 1088 operations per 1280 bytes, compute is the bound."""
MAX_TILES_TO_SPLIT, MAX_ROWS_TO_SPLIT = 64, 2**14
"""With no more tiles, and rows in all, than this the two cores of a device share each tile's context; many tiles spread
evenly anyway, and each row costs 5 KB of partial results."""
SPILL_BYTES = 512 * 1024
PLAN_FIELDS = 7
FIRST_BLOCK, NUM_BLOCKS, NUM_PAGES, BUFFER, IS_FIRST, NEXT_PAGES, TREE_START = range(PLAN_FIELDS)


def choose_block_tokens(rows: int) -> int:
    """Context tokens per block for a tile of `rows` rows: few rows want long fetches, many want small scores."""
    return 512 if rows <= 256 else 256


def count_vmem_bytes(
    rows: int, block_tokens: int, width: int, value_width: int, itemsize: int, *, is_split: bool = False
) -> int:
    """Count the VMEM of one kernel instance.

    Args:
        rows: Query rows of a tile, tokens x heads.
        block_tokens: Context tokens of a block.
        width: Row width of the cache, whole lanes.
        value_width: Columns that are values.
        itemsize: Bytes of an element of cache and queries.
        is_split: Whether partial results in float32 are the output.

    Returns:
        Bytes, the padding of registers included.
    """
    value_lanes = -(-value_width // LANES) * LANES
    queries = 2 * rows * width * itemsize
    outputs = 2 * rows * (value_lanes * 4 + LANES * 4 if is_split else value_lanes * itemsize)
    pages = 2 * block_tokens * width * itemsize
    state = rows * (value_lanes + 2 * LANES) * 4
    block = rows * (block_tokens + value_lanes) * 4
    if itemsize == 4:  # A product of float32 is one of three bfloat16 parts of each operand.
        block += 3 * 2 * (block_tokens * width + rows * (block_tokens + width))
    return queries + outputs + pages + state + block + SPILL_BYTES


def mla_attention_pallas_tpu(
    q,
    cache,
    block_tables,
    limits,
    tree_start,
    tree_mask,
    *,
    value_width,
    scale,
    interpret=False,
    block_tokens=None,
    num_cores=None,
    num_splits=None,
    vmem_limit_bytes=None,
):
    """See `mla_attention`.

    Args:
        q: As there.
        cache: As there; S must fill whole registers (module docstring).
        block_tables: As there.
        limits: As there.
        tree_start: As there.
        tree_mask: As there.
        value_width: As there.
        scale: As there.
        interpret: What `pallas_call` takes: True, or `pltpu.InterpretParams`, to run without a TPU.
        block_tokens: Context tokens per block, a multiple of S; None chooses.
        num_cores: 1 or 2 cores that share the grid; None asks the device.
        num_splits: Parts of each tile's context that are worked on apart; None chooses.
        vmem_limit_bytes: VMEM that the kernel may use; None = what it is counted to need.

    Returns:
        As there.

    Raises:
        ValueError: If the kernel cannot serve these shapes (`why_not_pallas_tpu`).
    """
    if (reason := why_not_pallas_tpu(q, cache)) is not None:
        raise ValueError(f"mla_attention: pallas_tpu cannot serve this call: {reason}")
    tiles_given, tokens_given, heads_given, width = q.shape
    heads = -(-heads_given // 8) * 8  # A token's heads fill whole registers.
    tokens = max(t for t in range(1, tokens_given + 1) if tokens_given % t == 0 and (t == 1 or t * heads <= MAX_ROWS))
    cuts = tokens_given // tokens
    tiles, rows = tiles_given * cuts, tokens * heads
    q_dtype, padding = q.dtype, cache.shape[2] - width
    if heads != heads_given or padding:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, heads - heads_given), (0, padding)))
        width += padding
    if q.dtype != cache.dtype:
        q = q.astype(jnp.float32)
    limits = limits.reshape(tiles, tokens).astype(jnp.int32)
    has_trees = tree_mask is not None
    if has_trees:
        mask = jnp.where(limits > 0, tree_mask.reshape(tiles, tokens), 0)
        start = jnp.repeat(tree_start.astype(jnp.int32), cuts)
    else:
        mask, start = jnp.zeros(limits.shape, jnp.uint32), jnp.zeros(tiles, jnp.int32)
    row_masks = jnp.stack([limits, jax.lax.bitcast_convert_type(mask, jnp.int32)], axis=-1)

    if num_cores is None:
        num_cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    if num_splits is None:
        is_small = tiles <= MAX_TILES_TO_SPLIT and tiles * rows <= MAX_ROWS_TO_SPLIT
        num_splits = num_cores if is_small else 1
    num_items = tiles * num_splits
    num_cores = min(num_cores, num_items)
    assert num_cores in (1, 2)
    per_core = -(-num_items // num_cores)
    page_size, num_table_pages = cache.shape[1], block_tables.shape[1]
    pages_per_block = max(1, min(num_table_pages, (block_tokens or choose_block_tokens(rows)) // page_size))
    block_tokens = pages_per_block * page_size
    plan, next_pages = _plan_items(
        limits, mask, start, block_tables, page_size, pages_per_block, num_splits=num_splits, per_core=per_core
    )

    def item(core, step):
        return jnp.minimum(core * per_core + step, num_items - 1)

    def of_tile(core, step, _):
        return item(core, step) % tiles, 0, 0

    def of_item(core, step, _):
        return item(core, step), 0, 0

    smem, any_space = pltpu.SMEM, pl.ANY
    out_shape = [jax.ShapeDtypeStruct((num_items, rows, value_width), q.dtype if num_splits == 1 else jnp.float32)]
    out_specs = [pl.BlockSpec((1, rows, value_width), of_item)]
    if num_splits > 1:
        out_shape.append(jax.ShapeDtypeStruct((num_items, rows, 1), jnp.float32))
        out_specs.append(pl.BlockSpec((1, rows, 1), of_item))
    context = num_table_pages * page_size
    itemsize = cache.dtype.itemsize
    if vmem_limit_bytes is None:
        vmem_limit_bytes = count_vmem_bytes(
            rows, block_tokens, width, value_width, q.dtype.itemsize, is_split=num_splits > 1
        )
    outputs = pl.pallas_call(
        partial(_kernel, scale=scale, has_trees=has_trees, num_items=num_items, per_core=per_core),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_cores, per_core),
            in_specs=[
                pl.BlockSpec((1, rows, width), of_tile),
                pl.BlockSpec((1, tokens, 2), of_tile),
                pl.BlockSpec(
                    (1, 1, num_table_pages), lambda *at: (item(*at[:2]) % tiles // cuts, 0, 0), memory_space=smem
                ),
                pl.BlockSpec((1, 1, pages_per_block), of_item, memory_space=smem),
                pl.BlockSpec(memory_space=any_space),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((2, pages_per_block, page_size, width), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((rows, value_width), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(  # Of full tables; how much of them is used is known at run time only.
            flops=2 * tiles * rows * context * (width + value_width),
            bytes_accessed=tiles * context * width * itemsize + 2 * q.size * q.dtype.itemsize,
            transcendentals=tiles * rows * context,
        ),
        interpret=interpret,
        name="mla_attention",
    )(plan, q.reshape(tiles, rows, width), row_masks, block_tables[:, None], next_pages[:, None], cache)
    out = outputs[0]
    if num_splits > 1:
        parts, log_mass = (part.reshape(num_splits, tiles, rows, -1) for part in outputs)
        out = jnp.sum(jax.nn.softmax(log_mass, axis=0) * parts, axis=0)
    return out.reshape(tiles_given, tokens_given, heads, value_width)[:, :, :heads_given].astype(q_dtype)


def _plan_items(limits, mask, start, block_tables, page_size, pages_per_block, *, num_splits, per_core):
    """Lay out the work: item = split * tiles + tile is one step of the grid.

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


def _kernel(plan_ref, q_ref, rows_ref, table_ref, next_ref, cache_ref, *rest, scale, has_trees, num_items, per_core):
    """One item: a tile of queries against one part of its context."""
    *out_refs, pages_ref, semaphores, acc_ref, peak_ref, mass_ref = rest
    _, pages_per_block, page_size, width = pages_ref.shape
    block_tokens = pages_per_block * page_size
    tokens = rows_ref.shape[1]
    rows, value_width = acc_ref.shape
    step = pl.program_id(1)
    item = pl.program_id(0) * per_core + step
    first_block, num_blocks, num_pages, first_buffer, is_first, next_count, tree_start = (
        plan_ref[jnp.minimum(item, num_items - 1) * PLAN_FIELDS + field] for field in range(PLAN_FIELDS)
    )

    def copy(page, index, buffer):
        return pltpu.make_async_copy(cache_ref.at[page], pages_ref.at[buffer, index], semaphores.at[buffer])

    def fetch(table, offset, count, buffer):
        @pl.loop(0, count)
        def _(index):
            copy(table[0, 0, offset + index], index, buffer).start()

    def attend(index, _):
        buffer = (first_buffer + index) % 2
        rest_of_pages = num_pages - index * pages_per_block
        follows = jnp.clip(rest_of_pages - pages_per_block, 0, pages_per_block)
        fetch(table_ref, (first_block + index + 1) * pages_per_block, follows, 1 - buffer)

        @pl.when(index == num_blocks - 1)
        def _():
            fetch(next_ref, 0, next_count, 1 - buffer)

        @pl.loop(0, jnp.minimum(rest_of_pages, pages_per_block))
        def _(index):
            copy(0, index, buffer).wait()

        context = pages_ref[buffer].reshape(block_tokens, width).astype(q_ref.dtype)
        scores = _dot(q_ref[0], context, ((1,), (1,))) * scale
        slot = (first_block + index) * block_tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, block_tokens), 1)
        is_seen = slot < rows_ref[0, :, 0:1]
        if has_trees:
            node = slot - tree_start
            masks = jnp.broadcast_to(rows_ref[0, :, 1:2], node.shape)
            bits = jax.lax.shift_right_logical(masks, jnp.clip(node, 0, MASK_BITS - 1)) & 1
            is_seen |= (node >= 0) & (node < MASK_BITS) & (bits == 1)
        bias = jnp.where(is_seen, 0.0, -jnp.inf)
        scores = (scores.reshape(tokens, rows // tokens, block_tokens) + bias[:, None, :]).reshape(rows, block_tokens)
        # A row may see nothing of a block; its maximum stays finite.
        peak = jnp.maximum(peak_ref[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - peak)
        keep = jnp.exp(peak_ref[...] - peak)
        peak_ref[...] = peak
        mass_ref[...] = mass_ref[...] * keep + jnp.sum(weights, axis=1, keepdims=True)
        values = _dot(weights.astype(q_ref.dtype), context[:, :value_width], ((1,), (0,)))
        acc_ref[...] = acc_ref[...] * keep + values
        return 0

    @pl.when(step == 0)
    def _():
        # What is never fetched is read all the same, with weight 0.
        pages_ref[...] = jnp.zeros_like(pages_ref)

    @pl.when(item < num_items)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        peak_ref[...] = jnp.full_like(peak_ref, jnp.finfo(jnp.float32).min)

        @pl.when(is_first == 1)
        def _():
            fetch(table_ref, first_block * pages_per_block, jnp.minimum(num_pages, pages_per_block), first_buffer)

        jax.lax.fori_loop(0, num_blocks, attend, 0)
        mass = jnp.maximum(mass_ref[...], 1e-30)
        out_refs[0][0] = (acc_ref[...] / mass).astype(out_refs[0].dtype)
        if len(out_refs) > 1:
            out_refs[1][0] = peak_ref[...] + jnp.log(mass)


def _dot(left, right, contract):
    """Product in float32; float32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        left, right, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
