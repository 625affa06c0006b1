"""Matmuls of a mixture of experts, each token with its own few."""

from kernels_pallas.grouped_matmul.api import grouped_mlp

__all__ = ["grouped_mlp"]
