"""Matmuls of a mixture of experts, each token with its own few."""

from kernels_pallas.grouped_matmul.api import grouped_mlp
from kernels_pallas.grouped_matmul.blocks import dequantise_blocks, quantise_blocks
from kernels_pallas.grouped_matmul.expert_parallel import expert_parallel_mlp

__all__ = ["dequantise_blocks", "expert_parallel_mlp", "grouped_mlp", "quantise_blocks"]
