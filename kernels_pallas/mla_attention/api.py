"""Signature of paged latent attention."""

from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas._dispatch import select
from kernels_pallas.mla_attention.layout import why_not_pallas_gpu, why_not_pallas_tpu
from kernels_pallas.mla_attention.reference import mla_attention_reference
from kernels_pallas.mla_attention.xla import mla_attention_xla


def _pallas_tpu(*args, **options):
    """Import Pallas when it is used: it takes half a second."""
    from kernels_pallas.mla_attention.pallas_tpu import mla_attention_pallas_tpu

    return mla_attention_pallas_tpu(*args, **options)


def _pallas_gpu(*args, **options):
    """Import Mosaic GPU where it is used."""
    from kernels_pallas.mla_attention.pallas_gpu import mla_attention_pallas_gpu

    return mla_attention_pallas_gpu(*args, **options)


IMPLEMENTATIONS = {
    "xla": mla_attention_xla,
    "reference": mla_attention_reference,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}


def mla_attention(
    q: Float[Array, "N Tq H W"],
    cache: Float[Array, "pages S Wc"],
    block_tables: Int[Array, "N P"],
    limits: Int[Array, "N Tq"],
    tree_start: Int[Array, " N"] | None = None,
    tree_mask: UInt32[Array, "N Tq"] | None = None,
    *,
    value_width: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "N Tq H C"]:
    """Attend from tiles of queries to the paged cache rows of their requests.

    All heads read the same rows: keys are their first W columns (what follows is padding, see `pad_row_width`), values
    their first `value_width` columns (absorbed MLA). A slot is a row's place in its request, counted through the block
    table. Row t of tile n sees every slot below limits[n, t], and of the `MASK_BITS` slots from tree_start[n] on those
    whose bit of tree_mask[n, t] is set, lowest bit first. Decode and prompt slices have limit = position + 1 and no
    mask; nodes of a draft tree have their ancestors' and their own bits.

    Args:
        q: Queries in latent space, [tile, row, head, row width].
        cache: Pages of rows, Wc >= W; the rows of the queries themselves are already written. Finite everywhere. In
            float8_e4m3fn, without scales, it meets the queries in their own type, whatever the implementation.
        block_tables: Pages of each tile's request in order; entries beyond the context may be anything in range.
        limits: Visible leading slots of each row; 0 = row not in use.
        tree_start: Slot of the lowest bit; None, with `tree_mask`, if no row has a mask.
        tree_mask: 0 = none.
        value_width: Leading columns of a row that are values.
        scale: Factor on the scores.
        implementation: Name of an implementation; None chooses by platform.

    Returns:
        Weighted sums of values; zeros in rows that are not in use.

    Raises:
        ValueError: If there is no implementation of that name, or the one that was named cannot serve these shapes.
    """
    refusals = {
        "pallas_tpu": why_not_pallas_tpu(q, cache),
        "pallas_gpu": why_not_pallas_gpu(q, cache, value_width),
    }
    function = select("mla_attention", IMPLEMENTATIONS, implementation, refusals)
    return function(q, cache, block_tables, limits, tree_start, tree_mask, value_width=value_width, scale=scale)
