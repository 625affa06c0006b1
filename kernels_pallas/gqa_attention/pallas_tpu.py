"""Paged grouped-query attention for TPU: the kernel of `_paged.tpu`, with the cache of `layout`.

Where a head is no multiple of 128 columns, its key and value share registers: queries are padded with zeros, which meet
the beginning of the value, and sums are taken over whole registers, and cut here.
"""

import jax.numpy as jnp

from kernels_pallas._dispatch import check_served
from kernels_pallas._paged.layout import LANES, pad_to_lanes
from kernels_pallas._paged.tpu import attend_pages
from kernels_pallas.gqa_attention.layout import count_kv_heads, why_not_pallas_tpu


def gqa_attention_pallas_tpu(q, cache, block_tables, limits, tree_start, tree_mask, *, scale, **tuning_options):
    """See `gqa_attention`.

    Args:
        q: As there.
        cache: As there; S must fill whole registers (`_paged.tpu`).
        block_tables: As there.
        limits: As there.
        tree_start: As there.
        tree_mask: As there.
        scale: As there.
        tuning_options: `interpret` and the like, see `attend_pages`.

    Returns:
        As there.

    Raises:
        KernelRefusedError: If the kernel cannot serve these shapes (`why_not_pallas_tpu`).
    """
    check_served("gqa_attention", "pallas_tpu", why_not_pallas_tpu(q, cache))
    head_dim = q.shape[3]
    value_start = head_dim // LANES * LANES
    out = attend_pages(
        jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, pad_to_lanes(head_dim) - head_dim))),
        cache,
        block_tables,
        limits,
        tree_start,
        tree_mask,
        kv_heads=count_kv_heads(q, cache),
        value_start=value_start,
        value_width=2 * head_dim - value_start,
        scale=scale,
        name="gqa_attention",
        **tuning_options,
    )
    return out[..., head_dim - value_start :]
