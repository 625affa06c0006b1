"""How the cache must lie for the kernels."""

import jax.numpy as jnp

from kernels_pallas._paged.layout import LANES, pad_to_lanes, why_not_pages

MAX_GPU_WIDTH = 576
"""Columns of a query of which 64, and twice 64 context tokens, are in a thread block's shared memory."""


def pad_row_width(width: int, platform: str) -> int:
    """Return the width at which to allocate the cache.

    Args:
        width: Columns of a row that mean something: latent and rope.
        platform: As `jax.default_backend()` names it.

    Returns:
        On TPU the next multiple of 128: what registers hold anyway, and the only width at which XLA keeps a page in one
        piece (576 columns make it store the pages as lanes, and copy the whole cache for a kernel). `width` elsewhere.
    """
    return pad_to_lanes(width) if platform == "tpu" else width


def why_not_pallas_tpu(q, cache) -> str | None:
    """Say why the TPU kernel cannot serve these shapes, or None if it can.

    Args:
        q: Queries [N, Tq, H, W], or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.

    Returns:
        The reason in a few words.
    """
    if cache.shape[2] % LANES:
        return f"cache rows are {cache.shape[2]} wide, no multiple of {LANES} (pad_row_width)"
    return why_not_pages(q, cache)


def why_not_pallas_gpu(q, cache, value_width: int) -> str | None:
    """Say why the GPU kernel cannot serve these shapes, or None if it can.

    Args:
        q: Queries [N, Tq, H, W], or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.
        value_width: Leading columns of a row that are values.

    Returns:
        The reason in a few words.
    """
    for name, array in (("queries", q), ("the cache", cache)):
        if array.dtype != jnp.bfloat16:
            return f"{name}: {array.dtype}, not bfloat16"
    width, page_size = q.shape[3], cache.shape[1]
    if width % 64 or value_width % 128 or cache.shape[2] % 8:
        return f"rows of {width} columns, {value_width} of them values, are no multiples of 64 and 128"
    if width > MAX_GPU_WIDTH:
        return f"rows of {width} columns: queries and context of {MAX_GPU_WIDTH} fill the shared memory"
    if page_size not in (8, 16, 32) and page_size % 64:
        return f"pages of {page_size} rows are not 8, 16, 32 or a multiple of 64"
    return None
