"""Paged grouped-query attention: decode, tree verification and chunked prefill in one."""

from kernels_pallas.gqa_attention.api import gqa_attention
from kernels_pallas.gqa_attention.layout import join_kv

__all__ = ["gqa_attention", "join_kv"]
