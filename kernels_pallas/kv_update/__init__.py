"""Write rows into the paged cache."""

from kernels_pallas.kv_update.api import kv_update

__all__ = ["kv_update"]
