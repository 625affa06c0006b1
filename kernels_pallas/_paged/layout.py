"""How a paged cache must lie for the TPU and GPU kernels."""

import jax.numpy as jnp
from jax.typing import DTypeLike

LANES = 128
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
"""What a cache may be in beside the types that queries have; its values carry no scales."""


def pad_to_lanes(width: int) -> int:
    """Return the next multiple of 128, what registers hold anyway."""
    return -(-width // LANES) * LANES


def product_type(queries: DTypeLike, cache: DTypeLike) -> jnp.dtype:
    """Return the type in which queries meet cache rows.

    Args:
        queries: Type of the queries.
        cache: Type of the cache.

    Returns:
        The queries' own for a float8 cache, in which its values are exact; the wider of both otherwise.
    """
    return jnp.dtype(queries) if cache == FLOAT8 else jnp.promote_types(queries, cache)


def why_not_pages(q, cache) -> str | None:
    """Say why the TPU kernel cannot serve these types or pages, or None if it can.

    Args:
        q: Queries, or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.

    Returns:
        The reason in a few words.
    """
    if cache.dtype not in (jnp.float32, jnp.bfloat16, FLOAT8):
        return f"the cache is {cache.dtype}, not float32, bfloat16 or float8_e4m3fn"
    sublanes = 32 // cache.dtype.itemsize
    if cache.shape[1] % sublanes:
        return f"pages of {cache.shape[1]} {cache.dtype} rows are no multiple of {sublanes}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries are {q.dtype}, not float32 or bfloat16"
    return None


def why_not_gpu(q, cache, value_width: int) -> str | None:
    """Say why the GPU kernel cannot serve these types, pages or widths, or None if it can.

    Args:
        q: Queries [..., key width], or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.
        value_width: Columns of a value.

    Returns:
        The reason in a few words.
    """
    if q.dtype != jnp.bfloat16:
        return f"queries are {q.dtype}, not bfloat16"
    if cache.dtype not in (jnp.bfloat16, FLOAT8):
        return f"the cache is {cache.dtype}, not bfloat16 or float8_e4m3fn"
    if cache.shape[1] not in (8, 16, 32) and cache.shape[1] % 64:
        return f"pages of {cache.shape[1]} rows are not 8, 16, 32 or a multiple of 64"
    # From 256 columns on two warpgroups share a value.
    of_values = 64 if value_width <= 256 else 128
    widths = ("keys", q.shape[-1], 64), ("values", value_width, of_values), ("cache rows", cache.shape[2], 64)
    for name, width, of in widths:
        if width % of:
            return f"{name} are {width} wide, no multiple of {of}"
    return None
