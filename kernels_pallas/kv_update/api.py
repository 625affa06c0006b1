"""Signatures of the cache writes."""

from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import select
from kernels_pallas.kv_update.reference import kv_move_reference, kv_update_reference
from kernels_pallas.kv_update.xla import kv_move_xla, kv_update_xla

IMPLEMENTATIONS = {"xla": kv_update_xla, "reference": kv_update_reference}
MOVE_IMPLEMENTATIONS = {"xla": kv_move_xla, "reference": kv_move_reference}


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
        rows: New rows; beyond the largest number of a float8 cache they become that number.
        slots: page * S + offset of each row. Padding rows go to page 0, which no request owns; only there may slots
            repeat, and what ends up in a repeated slot is any one of its rows.
        implementation: Name of an implementation; None chooses.

    Returns:
        The cache with the rows written.
    """
    return select("kv_update", IMPLEMENTATIONS, implementation)(cache, rows, slots)


def kv_move(
    cache: Float[Array, "pages S W"],
    sources: Int[Array, " T"],
    targets: Int[Array, " T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "pages S W"]:
    """Copy rows within the cache, all read before any is written; in place when `cache` is donated.

    Brings the KV of the accepted path of a draft tree together.

    Args:
        cache: Pages of rows.
        sources: page * S + offset of the rows to copy.
        targets: Where they go. Padding goes to page 0, which no request owns; only there may targets repeat.
        implementation: Name of an implementation; None chooses.

    Returns:
        The cache with the rows copied.
    """
    return select("kv_move", MOVE_IMPLEMENTATIONS, implementation)(cache, sources, targets)
