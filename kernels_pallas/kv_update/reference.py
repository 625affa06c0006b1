"""Cache writes, one row after the other."""

import jax

from kernels_pallas.kv_update.cast import cast_rows


def kv_update_reference(cache, rows, slots):
    """See `kv_update`."""

    def write(index, flat):
        return flat.at[slots[index]].set(cast_rows(rows[index], cache.dtype))

    flat = cache.reshape(-1, cache.shape[-1])
    return jax.lax.fori_loop(0, rows.shape[0], write, flat).reshape(cache.shape)


def kv_move_reference(cache, sources, targets):
    """See `kv_move`."""
    return kv_update_reference(cache, cache.reshape(-1, cache.shape[-1])[sources], targets)
