"""LM head, position-keyed draw and log-probability in one pass over the vocabulary."""

from kernels_pallas.tree_verify.api import tree_verify
from kernels_pallas.tree_verify.partials import Draws

__all__ = ["Draws", "tree_verify"]
