"""Programs compiled for TPUs that are not there: libtpu's compiler runs on any x86 Linux machine.

Layouts, unsupported operations, memory and VMEM are judged as on the hardware; nothing runs.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import jax
import numpy as np
import pytest
from _pytest.mark import ParameterSet
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest topology of each generation that has a host of its own."""
DEFAULT_VMEM_LIMIT = 16 * 2**20
"""What XLA gives a kernel that asks for nothing."""

# There is no metadata server to ask; and other processes may hold libtpu's lock file, which guards hardware.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@cache
def devices(topology_name: str) -> tuple[jax.Device, ...]:
    """Return the devices of a topology; skips the test where there is no libtpu.

    Args:
        topology_name: Such as v5e:2x2 or v5p:4x4x4.
    """
    pytest.importorskip("libtpu")
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices)


def slow_but(quick: Collection[str], names: Iterable[str]) -> list[ParameterSet]:
    """Mark as slow all of some specs but a few: `-m "aot and not slow"` leaves them out.

    Args:
        quick: Names of those that are not slow.
        names: All names.
    """
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@contextmanager
def tpu(generation: str, mesh_shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("x",)) -> Iterator[Mesh]:
    """Trace for a generation: inside, Pallas knows whose kernels it builds.

    Args:
        generation: A key of `GENERATIONS`, or the name of a topology.
        mesh_shape: Devices along each axis.
        axes: Names of the axes.

    Yields:
        A mesh of the first devices.
    """
    chosen = devices(GENERATIONS.get(generation, generation))[: int(np.prod(mesh_shape))]
    mesh = Mesh(np.array(chosen).reshape(mesh_shape), axes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


def compile_for(
    generation: str, function: Callable, *args: jax.ShapeDtypeStruct | None, donate: tuple[int, ...] = ()
) -> Compiled:
    """Compile for one chip.

    Args:
        generation: A key of `GENERATIONS`, or the name of a topology.
        function: What to compile.
        args: Shapes of its arguments; None stays None.
        donate: Arguments whose memory the results may take.

    Returns:
        The program; it cannot be called.
    """
    with tpu(generation) as mesh:
        sharding = NamedSharding(mesh, PartitionSpec())
        placed = [
            None if arg is None else jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=sharding) for arg in args
        ]
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()
