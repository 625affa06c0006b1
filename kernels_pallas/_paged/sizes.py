"""How much of a call the TPU kernel takes at a time, and the VMEM that this costs."""

from dataclasses import dataclass, replace

from kernels_pallas._paged.layout import pad_to_lanes

MAX_ROWS = 1024
"""Most rows (tokens x heads) that one KV head serves at a time. In absorbed MLA, 1024 x 2 x 1088 operations per 1280
bytes: compute is the bound."""
VMEM_BYTES = 16 * 2**20
"""What XLA gives a kernel unasked; no tile is chosen that is counted to need more."""
SPILL_BYTES = 512 * 1024
"""What the compiler spills; and scores that it may keep of all KV heads at a time."""
LANES_BYTES = 512
"""A column of one float32 takes a row of lanes."""


@dataclass(frozen=True, kw_only=True)
class TileSizes:
    """One instance of the kernel.

    Attributes:
        kv_heads: KV heads of a cache row.
        rows: Query rows of each, tokens x heads.
        block_tokens: Context tokens of a block.
        row_width: Columns of a cache row.
        key_width: Columns of a query, whole lanes.
        value_width: Columns of a KV head that are values.
        itemsize: Bytes of an element of the queries; the cache's are no larger.
        is_split: Whether partial results in float32 are the output.
    """

    kv_heads: int
    rows: int
    block_tokens: int
    row_width: int
    key_width: int
    value_width: int
    itemsize: int
    is_split: bool


def choose_block_tokens(rows: int) -> int:
    """Context tokens per block where a KV head has `rows` rows: few want long fetches, many want small scores."""
    return 512 if rows <= 256 else 256


def choose_tokens(num_tokens: int, heads: int, sizes: TileSizes) -> int:
    """Cut tiles that are too large.

    Args:
        num_tokens: Query tokens of a tile.
        heads: Of each KV head.
        sizes: What is known; `rows` is not read, and `block_tokens` is the most that there can be.

    Returns:
        The largest part of `num_tokens`, all equal, whose rows and VMEM stay within `MAX_ROWS` and `VMEM_BYTES`.
    """

    def fits(tokens: int) -> bool:
        rows = tokens * heads
        block_tokens = min(sizes.block_tokens, choose_block_tokens(rows))
        return rows <= MAX_ROWS and count_vmem_bytes(replace(sizes, rows=rows, block_tokens=block_tokens)) <= VMEM_BYTES

    return max(t for t in range(1, num_tokens + 1) if num_tokens % t == 0 and (t == 1 or fits(t)))


def count_vmem_bytes(sizes: TileSizes) -> int:
    """Count the VMEM of one kernel instance, the padding of registers included.

    Queries and outputs twice (pipelined), two blocks of pages; accumulator, maxima and sums; scores and weighted
    values of one KV head and block in float32; and half a MiB for what the compiler spills.
    """
    rows, all_rows, value_lanes = sizes.rows, sizes.kv_heads * sizes.rows, pad_to_lanes(sizes.value_width)
    queries = 2 * all_rows * sizes.key_width * sizes.itemsize
    outputs = 2 * all_rows * (value_lanes * 4 + LANES_BYTES if sizes.is_split else value_lanes * sizes.itemsize)
    pages = 2 * sizes.block_tokens * sizes.row_width * sizes.itemsize
    state = all_rows * (value_lanes * 4 + 2 * LANES_BYTES)
    block = rows * (sizes.block_tokens + value_lanes) * 4
    if sizes.itemsize == 4:  # A product of float32 is one of three bfloat16 parts of each operand.
        block += 3 * 2 * (sizes.block_tokens * sizes.key_width + rows * (sizes.block_tokens + sizes.key_width))
    return queries + outputs + pages + state + block + SPILL_BYTES
