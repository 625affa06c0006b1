"""Paged latent (absorbed MLA) attention: decode and chunked prefill in one."""

from kernels_pallas._paged.mask import MASK_BITS
from kernels_pallas.mla_attention.api import mla_attention
from kernels_pallas.mla_attention.layout import pad_row_width

__all__ = ["MASK_BITS", "mla_attention", "pad_row_width"]
