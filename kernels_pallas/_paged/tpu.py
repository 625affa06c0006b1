"""Attention over a paged cache for TPU: one Mosaic kernel for decode, tree verification and prompt slices.

`mla_attention` and `gqa_attention` are this kernel. A cache row has the same columns for each KV head: the first
`key_width` are its key, `value_width` from `value_start` on its value. Absorbed MLA is one KV head whose value is the
beginning of its key; grouped queries are several whose value lies behind the key.

Layout. The cache stays in HBM as it is, [pages, S, Wc], each KV head's columns a multiple of 128 lanes: keys and
values are whole registers. A page is one contiguous DMA, whatever the number of heads, and each row is read once. S
must fill whole registers: a multiple of 8 rows (float32), 16 (bfloat16) or 32 (float8). Small pages make small DMAs.

Work. A tile of Tq query tokens is, for each KV head, one matrix of R = Tq x H / KV heads rows; tiles that are too large
are cut (`choose_tokens`). The grid walks the tiles; inside, a loop walks the blocks of the tile's context that hold
anything visible, so that cost follows each request's own context. Pages go into one of two buffers while the other is
computed on, and the last block of a tile already fetches the first block of the next tile: the fetch pipeline never
drains between tiles. Softmax is online and in float32; products take the operands in their own type (float32 at full
precision). KV heads with few rows are written out, so that the compiler may overlap them; with many they are a loop.

Cores. On chips whose two cores are one device (v4, v5p) the grid has an outer parallel dimension of 2: with many tiles
each core takes half of them, and with few (`num_splits`) each takes half of every tile's context; partial results are
then combined in XLA by their log-sum-exp. On one-core devices a split would only add work: a single tile's pages
already follow each other without a gap.

VMEM is counted (`count_vmem_bytes`) and given to the compiler as the limit.

Float8 caches are fetched as they are, and a block becomes the queries' type when it is multiplied; every generation's
compiler takes that cast, those without float8 products too. The cache must be finite: weights of rows that nobody sees
are 0, and 0 x NaN is NaN.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas._paged.layout import LANES, product_type
from kernels_pallas._paged.mask import MASK_BITS
from kernels_pallas._paged.plan import PLAN_FIELDS, plan_items
from kernels_pallas._paged.sizes import SPILL_BYTES, TileSizes, choose_block_tokens, choose_tokens, count_vmem_bytes

MAX_TILES_TO_SPLIT, MAX_ROWS_TO_SPLIT = 64, 2**14
"""With no more tiles, and rows in all, than this the two cores of a device share each tile's context; many tiles spread
evenly anyway, and each row of absorbed MLA costs 5 KB of partial results."""


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
    interpret=False,
    block_tokens=None,
    num_cores=None,
    num_splits=None,
    vmem_limit_bytes=None,
):
    """Attend from tiles of queries to the paged cache rows of their requests.

    Args:
        q: Queries [tile, token, head, key width], whole lanes; heads of one KV head are neighbours.
        cache: Pages [pages, S, Wc], finite everywhere; S must fill whole registers (module docstring).
        block_tables: As in `mla_attention`.
        limits: As in `mla_attention`.
        tree_start: As in `mla_attention`.
        tree_mask: As in `mla_attention`.
        kv_heads: KV heads of a row.
        value_start: First column of a KV head's value, a multiple of 128.
        value_width: Columns of a value.
        scale: Factor on the scores.
        name: Of the kernel, in traces.
        interpret: What `pallas_call` takes: True, or `pltpu.InterpretParams`, to run without a TPU.
        block_tokens: Context tokens per block, a multiple of S; None chooses.
        num_cores: 1 or 2 cores that share the grid; None asks the device.
        num_splits: Parts of each tile's context that are worked on apart; None chooses.
        vmem_limit_bytes: VMEM that the kernel may use; None = what it is counted to need.

    Returns:
        Weighted sums of values [tile, token, head, value width] in the type of q; zeros in rows that are not in use.
    """
    tiles_given, tokens_given, num_heads, key_width = q.shape
    heads_given, q_dtype = num_heads // kv_heads, q.dtype
    heads = -(-heads_given // 8) * 8  # A token's heads fill whole registers.
    page_size, num_table_pages = cache.shape[1], block_tables.shape[1]
    if num_cores is None:
        num_cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    q = q.reshape(tiles_given, tokens_given, kv_heads, heads_given, key_width)
    if heads != heads_given:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, heads - heads_given), (0, 0)))
    q = q.astype(product_type(q.dtype, cache.dtype))
    sizes = TileSizes(
        kv_heads=kv_heads,
        rows=0,
        block_tokens=num_table_pages * page_size,
        row_width=cache.shape[2],
        key_width=key_width,
        value_width=value_width,
        itemsize=q.dtype.itemsize,
        is_split=num_cores > 1,
    )
    tokens = choose_tokens(tokens_given, heads, sizes)
    cuts = tokens_given // tokens
    tiles, rows, all_rows = tiles_given * cuts, tokens * heads, kv_heads * tokens * heads
    q = q.reshape(tiles, tokens, kv_heads, heads, key_width).swapaxes(1, 2).reshape(tiles, all_rows, key_width)

    limits = limits.reshape(tiles, tokens).astype(jnp.int32)
    has_trees = tree_mask is not None
    if has_trees:
        mask = jnp.where(limits > 0, tree_mask.reshape(tiles, tokens), 0)
        start = jnp.repeat(tree_start.astype(jnp.int32), cuts)
    else:
        mask, start = jnp.zeros(limits.shape, jnp.uint32), jnp.zeros(tiles, jnp.int32)
    row_masks = jnp.stack([limits, jax.lax.bitcast_convert_type(mask, jnp.int32)], axis=-1)

    if num_splits is None:
        is_small = tiles <= MAX_TILES_TO_SPLIT and tiles * all_rows <= MAX_ROWS_TO_SPLIT
        num_splits = num_cores if is_small else 1
    num_items = tiles * num_splits
    num_cores = min(num_cores, num_items)
    assert num_cores in (1, 2)
    per_core = -(-num_items // num_cores)
    pages_per_block = max(1, min(num_table_pages, (block_tokens or choose_block_tokens(rows)) // page_size))
    block_tokens = pages_per_block * page_size
    plan, next_pages = plan_items(
        limits, mask, start, block_tables, page_size, pages_per_block, num_splits=num_splits, per_core=per_core
    )
    if vmem_limit_bytes is None:
        vmem_limit_bytes = count_vmem_bytes(
            replace(sizes, rows=rows, block_tokens=block_tokens, is_split=num_splits > 1)
        )

    def item(core, step):
        return jnp.minimum(core * per_core + step, num_items - 1)

    def of_tile(core, step, _):
        return item(core, step) % tiles, 0, 0

    def of_item(core, step, _):
        return item(core, step), 0, 0

    out_shape = [jax.ShapeDtypeStruct((num_items, all_rows, value_width), q.dtype if num_splits == 1 else jnp.float32)]
    out_specs = [pl.BlockSpec((1, all_rows, value_width), of_item)]
    if num_splits > 1:
        out_shape.append(jax.ShapeDtypeStruct((num_items, all_rows, 1), jnp.float32))
        out_specs.append(pl.BlockSpec((1, all_rows, 1), of_item))
    context = num_table_pages * page_size
    outputs = pl.pallas_call(
        partial(
            _kernel,
            kv_heads=kv_heads,
            value_start=value_start,
            scale=scale,
            has_trees=has_trees,
            num_items=num_items,
            per_core=per_core,
        ),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_cores, per_core),
            in_specs=[
                pl.BlockSpec((1, all_rows, key_width), of_tile),
                pl.BlockSpec((1, tokens, 2), of_tile),
                pl.BlockSpec(
                    (1, 1, num_table_pages), lambda *at: (item(*at[:2]) % tiles // cuts, 0, 0), memory_space=pltpu.SMEM
                ),
                pl.BlockSpec((1, 1, pages_per_block), of_item, memory_space=pltpu.SMEM),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((2, pages_per_block, page_size, cache.shape[2]), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((all_rows, value_width), jnp.float32),
                pltpu.VMEM((all_rows, 1), jnp.float32),
                pltpu.VMEM((all_rows, 1), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(  # Of full tables; how much of them is used is known at run time only.
            flops=2 * tiles * all_rows * context * (key_width + value_width),
            bytes_accessed=tiles * context * cache.shape[2] * cache.dtype.itemsize + 2 * q.size * q.dtype.itemsize,
            transcendentals=tiles * all_rows * context,
        ),
        interpret=interpret,
        name=name,
    )(plan, q, row_masks, block_tables[:, None], next_pages[:, None], cache)
    out = outputs[0]
    if num_splits > 1:
        parts, log_mass = (part.reshape(num_splits, tiles, all_rows, -1) for part in outputs)
        out = jnp.sum(jax.nn.softmax(log_mass, axis=0) * parts, axis=0)
    out = out.reshape(tiles, kv_heads, tokens, heads, value_width).swapaxes(1, 2)[:, :, :, :heads_given]
    return out.reshape(tiles_given, tokens_given, num_heads, value_width).astype(q_dtype)


def _kernel(
    plan_ref,
    q_ref,
    rows_ref,
    table_ref,
    next_ref,
    cache_ref,
    *rest,
    kv_heads,
    value_start,
    scale,
    has_trees,
    num_items,
    per_core,
):
    """One item: a tile of queries against one part of its context."""
    *out_refs, pages_ref, semaphores, acc_ref, peak_ref, mass_ref = rest
    _, pages_per_block, page_size, row_width = pages_ref.shape
    block_tokens = pages_per_block * page_size
    tokens, key_width = rows_ref.shape[1], q_ref.shape[2]
    rows, value_width = acc_ref.shape[0] // kv_heads, acc_ref.shape[1]
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

    def context(head, start, width, buffer):
        columns = pl.ds(pl.multiple_of(head * (row_width // kv_heads) + start, LANES), width)
        return pages_ref[buffer, :, :, columns].reshape(block_tokens, width).astype(q_ref.dtype)

    def attend_head(head, buffer, bias):
        own = pl.ds(pl.multiple_of(head * rows, 8), rows)
        scores = _dot(q_ref[0, own], context(head, 0, key_width, buffer), ((1,), (1,))) * scale
        scores = (scores.reshape(tokens, rows // tokens, block_tokens) + bias[:, None, :]).reshape(rows, block_tokens)
        # A row may see nothing of a block; its maximum stays finite.
        peak = jnp.maximum(peak_ref[own], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - peak)
        keep = jnp.exp(peak_ref[own] - peak)
        peak_ref[own] = peak
        mass_ref[own] = mass_ref[own] * keep + jnp.sum(weights, axis=1, keepdims=True)
        values = _dot(weights.astype(q_ref.dtype), context(head, value_start, value_width, buffer), ((1,), (0,)))
        acc_ref[own] = acc_ref[own] * keep + values

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

        slot = (first_block + index) * block_tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, block_tokens), 1)
        is_seen = slot < rows_ref[0, :, 0:1]
        if has_trees:
            node = slot - tree_start
            masks = jnp.broadcast_to(rows_ref[0, :, 1:2], node.shape)
            bits = jax.lax.shift_right_logical(masks, jnp.clip(node, 0, MASK_BITS - 1)) & 1
            is_seen |= (node >= 0) & (node < MASK_BITS) & (bits == 1)
        bias = jnp.where(is_seen, 0.0, -jnp.inf)
        if kv_heads * rows * block_tokens * 4 <= SPILL_BYTES or kv_heads == 1:
            for head in range(kv_heads):
                attend_head(head, buffer, bias)
        else:  # Written out, heads overlap, and so does the memory that their scores take.
            pl.loop(0, kv_heads)(lambda head: attend_head(head, buffer, bias))
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
