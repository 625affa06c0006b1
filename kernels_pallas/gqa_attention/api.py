"""Signature of paged grouped-query attention."""

from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas._dispatch import select
from kernels_pallas.gqa_attention.layout import count_kv_heads, why_not_pallas_gpu, why_not_pallas_tpu
from kernels_pallas.gqa_attention.reference import gqa_attention_reference
from kernels_pallas.gqa_attention.xla import gqa_attention_xla


def _pallas_tpu(*args, **options):
    """Import Pallas when it is used: it takes half a second."""
    from kernels_pallas.gqa_attention.pallas_tpu import gqa_attention_pallas_tpu

    return gqa_attention_pallas_tpu(*args, **options)


def _pallas_gpu(*args, **options):
    """Import Mosaic GPU where it is used."""
    from kernels_pallas.gqa_attention.pallas_gpu import gqa_attention_pallas_gpu

    return gqa_attention_pallas_gpu(*args, **options)


IMPLEMENTATIONS = {
    "xla": gqa_attention_xla,
    "reference": gqa_attention_reference,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}


def gqa_attention(
    q: Float[Array, "N Tq H D"],
    cache: Float[Array, "pages S Wc"],
    block_tables: Int[Array, "N P"],
    limits: Int[Array, "N Tq"],
    tree_start: Int[Array, " N"] | None = None,
    tree_mask: UInt32[Array, "N Tq"] | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "N Tq H D"]:
    """Attend from tiles of queries to the paged keys and values of their requests.

    Wc = 2 x Hkv x D says how many KV heads there are; H / Hkv neighbouring query heads share each. Slots, limits and
    trees are those of `mla_attention`: row t of tile n sees every slot below limits[n, t], and of the `MASK_BITS` slots
    from tree_start[n] on those whose bit of tree_mask[n, t] is set, lowest bit first.

    Args:
        q: Queries, rotated, [tile, row, head, head dim].
        cache: Pages of rows as `join_kv` lays them out; the rows of the queries themselves are already written. Finite
            everywhere. In float8_e4m3fn as in `mla_attention`.
        block_tables: Pages of each tile's request in order; entries beyond the context may be anything in range.
        limits: Visible leading slots of each row; 0 = row not in use.
        tree_start: Slot of the lowest bit; None, with `tree_mask`, if no row has a mask.
        tree_mask: 0 = none.
        scale: Factor on the scores.
        implementation: Name of an implementation; None chooses by platform.

    Returns:
        Weighted sums of values; zeros in rows that are not in use.

    Raises:
        ValueError: If the cache's rows are not heads as wide as the queries', if there is no implementation of that
            name, or if the one that was named cannot serve these shapes.
    """
    count_kv_heads(q, cache)
    refusals = {"pallas_tpu": why_not_pallas_tpu(q, cache), "pallas_gpu": why_not_pallas_gpu(q, cache)}
    function = select("gqa_attention", IMPLEMENTATIONS, implementation, refusals)
    return function(q, cache, block_tables, limits, tree_start, tree_mask, scale=scale)
