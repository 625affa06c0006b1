"""Write rows into the paged cache, and move rows within it."""

from kernels_pallas.kv_update.api import kv_move, kv_update

__all__ = ["kv_move", "kv_update"]
