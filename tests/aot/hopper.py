"""Programs compiled for an H200 that is not there: the CUDA plugin's compiler runs on any x86 Linux machine.

Mosaic GPU lowers to PTX and ptxas to a program for sm_90a, as on the hardware; nothing runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } device_description_str: "NVIDIA H200"
"""
"""XLA's GpuTargetConfig, as text of a protocol buffer."""


_said: dict[tuple[str, ...], str] = {}
"""PTX and ptxas' report by the hashes of a program's kernels: the plugin compiles equal kernels once in a process."""


@dataclass(frozen=True, kw_only=True)
class HopperProgram:
    """What the compilers say of a program with kernels of ours."""

    compiled: Compiled
    """XLA's program; it cannot be called."""
    ptx: str
    registers: int
    """Per thread at launch, the most of any kernel."""
    spill_bytes: int
    """Stored to memory by a thread for want of registers, in all kernels."""


@cache
def devices(count: int) -> np.ndarray:
    """Return the H200s of a host; skips the test where there is no CUDA plugin of jax's version.

    Args:
        count: How many.
    """
    pytest.importorskip("jax_plugins.xla_cuda13", reason="no CUDA plugin: docs/kernels.md says how to install it")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="H200", topology=f"1x{count}x1", target_config=H200
    )
    return np.array(topology.devices)


@pytest.fixture
def compile_for_hopper(monkeypatch, capfd) -> Callable[..., HopperProgram]:
    """Compile a function with kernels of ours for given shapes of its arguments; None stays None."""

    def compile_for(function: Callable, *args: jax.ShapeDtypeStruct | None) -> HopperProgram:
        mesh = Mesh(devices(1), ("x",))
        sharding = NamedSharding(mesh, PartitionSpec())
        placed = [
            None if arg is None else jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=sharding) for arg in args
        ]
        monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
        monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        capfd.readouterr()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(function).lower(*placed)
            compiled = lowered.compile()
        kernels = tuple(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', lowered.as_text()))
        said = _said.setdefault(kernels, "".join(capfd.readouterr()))
        registers = re.findall(r"Used (\d+) registers", said)
        spilled = re.findall(r"bytes stack frame, (\d+) bytes spill stores", said)
        assert len(registers) == len(spilled) == len(kernels) > 0
        return HopperProgram(
            compiled=compiled, ptx=said, registers=max(map(int, registers)), spill_bytes=sum(map(int, spilled))
        )

    return compile_for
