"""A `jax.jit` for tests: tiny programs spend seconds in LLVM and milliseconds running."""

from functools import partial

import jax

quick_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
"""Compiles in half the time. Matmuls are library calls and run as ever."""
