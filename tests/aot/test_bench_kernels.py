"""`scripts/bench_kernels.py` compiles for the devices that it is written for, and its loops copy no large array.

Its two modules are imported as Python does when the script runs.
"""

import importlib
from functools import partial
from pathlib import Path

import jax
import pytest

from tests.aot.hopper import compile_for_hopper
from tests.aot.topology import compile_for

__all__ = ["compile_for_hopper"]
pytestmark = pytest.mark.aot
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_kernels")


def smallest(bench, platform):
    return list({case.operation: case for case in reversed(list(bench.list_cases(platform)))}.values())


def loop_args(bench, case, function):
    """A timed loop, and its arguments' shapes: what the cases would allocate is never made."""
    call = partial(case.call, function)
    arrays = jax.eval_shape(case.make_arrays)
    loop = bench.make_loop(lambda *a: case.feed(a[0], call(*a)))
    return jax.jit(partial(loop.__wrapped__, 3), donate_argnums=0), arrays


def check_memory(memory, arrays):
    largest = max(array.size * array.dtype.itemsize for array in arrays if array is not None)
    assert memory.temp_size_in_bytes < max(largest / 2, 2**22)


def test_every_operation_compiles_for_hopper(bench, compile_for_hopper):
    for case in smallest(bench, "gpu"):
        if "pallas_gpu" in case.implementations:
            loop, args = loop_args(bench, case, case.implementations["pallas_gpu"])
            program = compile_for_hopper(loop, *args)
            assert "wgmma.mma_async" in program.ptx
            check_memory(program.compiled.memory_analysis(), args)


def test_every_operation_compiles_for_tpu(bench):
    for case in smallest(bench, "tpu"):
        for function in case.implementations.values():
            loop, args = loop_args(bench, case, function)
            check_memory(compile_for("v5e", loop, *args).memory_analysis(), args)
