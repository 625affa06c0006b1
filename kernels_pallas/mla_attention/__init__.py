"""Paged latent (absorbed MLA) attention: decode and chunked prefill in one."""

from kernels_pallas.mla_attention.api import mla_attention

__all__ = ["mla_attention"]
