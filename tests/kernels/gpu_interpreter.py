"""Mosaic GPU's interpreter, made fast enough for tests; on a GPU there is none, and the same tests run the kernels.

It runs warpgroups as threads, with barriers and copies, in memory that is NaN until written. It knows no registers, and
wgmma ends at once there. As it comes it compiles the kernel again for every thread of every thread block.
"""

import functools
import threading

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from tests.quick import quick_jit

HAS_GPU = jax.default_backend() == "gpu"
INTERPRET = None if HAS_GPU else InterpretGPUParams(out_of_bounds_reads="uninitialized")
"""What a copy reads beyond an array is zero on a GPU, and NaN in the interpreter."""
FIND_RACES = InterpretGPUParams(out_of_bounds_reads="uninitialized", detect_races=True)
_compiling = threading.Lock()


@functools.cache
def _compile(jaxpr, shapes):
    return quick_jit(functools.partial(jax.core.eval_jaxpr, jaxpr)).lower(*shapes).compile()


def _run_jaxpr(jaxpr, consts, *args):
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    with _compiling:
        program = _compile(jaxpr, (tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in consts), *leaves))
    program(tuple(consts), *args)


@pytest.fixture
def gpu_interpreter(monkeypatch):
    """Compile each kernel once while a test runs."""
    monkeypatch.setattr(thread_map, "_run_jaxpr", _run_jaxpr)
