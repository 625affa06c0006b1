"""Paged grouped-query attention for Hopper: the kernel of `_paged.gpu`, with the cache of `layout`."""

from kernels_pallas._dispatch import check_served
from kernels_pallas._paged.gpu import attend_pages
from kernels_pallas.gqa_attention.layout import count_kv_heads, why_not_pallas_gpu


def gqa_attention_pallas_gpu(q, cache, block_tables, limits, tree_start, tree_mask, *, scale, **tuning_options):
    """See `gqa_attention`.

    Args:
        q: As there, bfloat16.
        cache: As there, bfloat16 or float8_e4m3fn.
        block_tables: As there.
        limits: As there.
        tree_start: As there.
        tree_mask: As there.
        scale: As there.
        tuning_options: `interpret` and the like, see `attend_pages`.

    Returns:
        As there.

    Raises:
        KernelRefusedError: If the kernel cannot serve these shapes (`why_not_pallas_gpu`).
    """
    check_served("gqa_attention", "pallas_gpu", why_not_pallas_gpu(q, cache))
    return attend_pages(
        q,
        cache,
        block_tables,
        limits,
        tree_start,
        tree_mask,
        kv_heads=count_kv_heads(q, cache),
        value_start=q.shape[3],
        value_width=q.shape[3],
        scale=scale,
        name="gqa_attention",
        **tuning_options,
    )
