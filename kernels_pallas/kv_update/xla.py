"""Cache writes as one scatter."""

from kernels_pallas.kv_update.cast import cast_rows


def kv_update_xla(cache, rows, slots):
    """See `kv_update`."""
    flat = cache.reshape(-1, cache.shape[-1])
    return flat.at[slots].set(cast_rows(rows, cache.dtype), mode="promise_in_bounds").reshape(cache.shape)


def kv_move_xla(cache, sources, targets):
    """See `kv_move`."""
    return kv_update_xla(cache, cache.reshape(-1, cache.shape[-1])[sources], targets)
