"""How a paged cache must lie for the TPU kernel."""

import jax.numpy as jnp

LANES = 128


def pad_to_lanes(width: int) -> int:
    """Return the next multiple of 128, what registers hold anyway."""
    return -(-width // LANES) * LANES


def why_not_pages(q, cache) -> str | None:
    """Say why the TPU kernel cannot serve these types or pages, or None if it can.

    Args:
        q: Queries, or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.

    Returns:
        The reason in a few words.
    """
    if cache.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the cache is {cache.dtype}, not float32 or bfloat16"
    sublanes = 32 // cache.dtype.itemsize
    if cache.shape[1] % sublanes:
        return f"pages of {cache.shape[1]} {cache.dtype} rows are no multiple of {sublanes}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries are {q.dtype}, not float32 or bfloat16"
    return None
