"""Signature of paged latent attention."""

from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import select
from kernels_pallas.mla_attention.reference import mla_attention_reference
from kernels_pallas.mla_attention.xla import mla_attention_xla

IMPLEMENTATIONS = {"xla": mla_attention_xla, "reference": mla_attention_reference}


def mla_attention(
    q: Float[Array, "N Tq H W"],
    cache: Float[Array, "pages S W"],
    block_tables: Int[Array, "N P"],
    first_position: Int[Array, " N"],
    num_queries: Int[Array, " N"],
    *,
    value_width: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "N Tq H C"]:
    """Attend from tiles of queries to the paged cache rows of their requests.

    All heads read the same rows: keys are the whole row, values its first `value_width` columns (absorbed MLA). Row t
    of tile n, for t < num_queries[n], has position first_position[n] + t and sees every position of its request up to
    its own. Decode is Tq = 1; a prompt slice is several tiles.

    Args:
        q: Queries in latent space, [tile, row, head, row width].
        cache: Pages of rows; the rows of the queries themselves are already written.
        block_tables: Pages of each tile's request in order; entries beyond the context may be anything in range.
        first_position: Position of row 0 of each tile.
        num_queries: Rows in use; 0 = padding tile.
        value_width: Leading columns of a row that are values.
        scale: Factor on the scores.
        implementation: Name of an implementation; None chooses.

    Returns:
        Weighted sums of values; zeros in rows that are not in use.
    """
    function = select("mla_attention", IMPLEMENTATIONS, implementation)
    return function(q, cache, block_tables, first_position, num_queries, value_width=value_width, scale=scale)
