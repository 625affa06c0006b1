"""Paged latent attention for Hopper: the kernel of `_paged.gpu` with one KV head, whose value begins its key."""

from kernels_pallas._dispatch import check_served
from kernels_pallas._paged.gpu import attend_pages
from kernels_pallas.mla_attention.layout import why_not_pallas_gpu


def mla_attention_pallas_gpu(
    q, cache, block_tables, limits, tree_start, tree_mask, *, value_width, scale, **tuning_options
):
    """See `mla_attention`.

    Args:
        q: As there, bfloat16.
        cache: As there, bfloat16 or float8_e4m3fn.
        block_tables: As there.
        limits: As there.
        tree_start: As there.
        tree_mask: As there.
        value_width: As there.
        scale: As there.
        tuning_options: `interpret` and the like, see `attend_pages`.

    Returns:
        As there.

    Raises:
        KernelRefusedError: If the kernel cannot serve these shapes (`why_not_pallas_gpu`).
    """
    check_served("mla_attention", "pallas_gpu", why_not_pallas_gpu(q, cache, value_width))
    return attend_pages(
        q,
        cache,
        block_tables,
        limits,
        tree_start,
        tree_mask,
        kv_heads=1,
        value_start=0,
        value_width=value_width,
        scale=scale,
        name="mla_attention",
        **tuning_options,
    )
