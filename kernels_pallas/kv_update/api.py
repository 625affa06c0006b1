"""Signature of the cache write."""

from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import select
from kernels_pallas.kv_update.reference import kv_update_reference
from kernels_pallas.kv_update.xla import kv_update_xla

IMPLEMENTATIONS = {"xla": kv_update_xla, "reference": kv_update_reference}


def kv_update(
    cache: Float[Array, "pages S W"],
    rows: Float[Array, "T W"],
    slots: Int[Array, " T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "pages S W"]:
    """Write one row per token; in place when `cache` is donated.

    Args:
        cache: Pages of rows.
        rows: New rows.
        slots: page * S + offset of each row. Padding rows go to page 0, which no request owns; only there may slots
            repeat, and what ends up in a repeated slot is any one of its rows.
        implementation: Name of an implementation; None chooses.

    Returns:
        The cache with the rows written.
    """
    return select("kv_update", IMPLEMENTATIONS, implementation)(cache, rows, slots)
