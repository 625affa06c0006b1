"""Settings of every test: CPU unless asked otherwise, and the same examples in every run."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Read by jax at its first use. A machine with an accelerator can still be asked for: JAX_PLATFORMS=cuda pytest.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

hypothesis.settings.register_profile("seer_jax", derandomize=True, deadline=None)
hypothesis.settings.load_profile("seer_jax")

MEMORY_MAPS = Path("/proc/self/maps")
MAX_MEMORY_MAPS = 25_000
"""A program compiled for CPU keeps dozens. Linux allows a process 65,530, and at the next one LLVM dies of SIGSEGV."""


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each file's tests to one process, and those that start Ray all to the same: a machine has one cluster."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs() -> Iterator[None]:
    """Let a long session go on: its programs are dropped before there are too many."""
    yield
    if MEMORY_MAPS.exists() and len(MEMORY_MAPS.read_bytes().splitlines()) > MAX_MEMORY_MAPS:
        import jax  # Not above: it reads the environment.

        jax.clear_caches()
        gc.collect()
