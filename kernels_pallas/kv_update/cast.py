"""How rows become what a cache holds."""

import jax.numpy as jnp


def cast_rows(rows, dtype):
    """Cast rows to a cache's type.

    Args:
        rows: Of any shape.
        dtype: Of the cache.

    Returns:
        The rows; in float8 clipped to what it can hold, since a plain cast makes NaN of larger numbers. NaN stays NaN.
    """
    limits = jnp.finfo(dtype)
    if limits.bits == 8 and rows.dtype != dtype:
        rows = jnp.clip(rows, float(limits.min), float(limits.max))
    return rows.astype(dtype)
