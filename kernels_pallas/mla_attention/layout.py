"""How the cache must lie for the kernels."""

from kernels_pallas._paged.layout import LANES, pad_to_lanes, why_not_gpu, why_not_pages

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
    if (width := q.shape[3]) > MAX_GPU_WIDTH:
        return f"rows of {width} columns: queries and context of {MAX_GPU_WIDTH} fill the shared memory"
    return why_not_gpu(q, cache, value_width)
