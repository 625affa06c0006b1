"""Paged latent attention for TPU: the kernel of `_paged.tpu` with one KV head, whose value is the beginning of its key.

Rows are 640 columns: 512 latent + 64 rope + 64 of padding, which registers hold anyway. At 576 XLA stores the array
with the pages as lanes, which pads nothing, and copies all of it at every call (seen in compiled programs); so the
engine allocates what `pad_row_width` says, queries are padded here, and `why_not_pallas_tpu` refuses anything else. A
page of 64 bfloat16 rows is a DMA of 80 KB; its values are the first 512 columns of the same rows.

VMEM of the largest bfloat16 case, 1024 rows and 256 tokens a block: queries 2.5 + outputs 2 + pages 0.6 + accumulator,
maxima and sums 3 + scores and weighted values of a block 3 + spills 0.5 = 11.6 MiB. 16 rows, 512 tokens: 1.9 MiB.
"""

import jax.numpy as jnp

from kernels_pallas._dispatch import check_served
from kernels_pallas._paged.tpu import attend_pages
from kernels_pallas.mla_attention.layout import why_not_pallas_tpu


def mla_attention_pallas_tpu(
    q, cache, block_tables, limits, tree_start, tree_mask, *, value_width, scale, **tuning_options
):
    """See `mla_attention`.

    Args:
        q: As there.
        cache: As there; S must fill whole registers (`_paged.tpu`).
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
        KernelRefusedError: If the kernel cannot serve these shapes (`why_not_pallas_tpu`).
    """
    check_served("mla_attention", "pallas_tpu", why_not_pallas_tpu(q, cache))
    return attend_pages(
        jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, cache.shape[2] - q.shape[3]))),
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
