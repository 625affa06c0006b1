"""Fixtures of the kernels' tests."""

from tests.kernels.gpu_interpreter import gpu_interpreter

__all__ = ["gpu_interpreter"]
