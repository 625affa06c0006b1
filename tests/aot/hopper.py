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
class HopperKernel:
    """What the compilers say of one kernel.

    No interpreter checks what stands here but `ptx`: it has no registers, sees what was written at once, and its
    products are done when they are asked for.
    """

    name: str
    ptx: str
    warpgroups: int
    """Of a thread block."""
    registers: int
    """Per thread at launch."""
    spill_bytes: int
    """Stored to memory by a thread for want of registers."""

    @property
    def fences(self) -> int:
        """Places where what a thread wrote to shared memory is shown to wgmma and to copies."""
        return self.ptx.count("fence.proxy.async")

    @property
    def waits(self) -> set[int]:
        """How many products may go on where products are waited for: 0 = none."""
        return {int(depth) for depth in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", self.ptx)}

    def check_registers(self) -> None:
        """One warpgroup at most gives registers up, and all others together take no more than there are then."""
        given = [int(n) for n in re.findall(r"setmaxnreg\.dec\.sync\.aligned\.u32\s+(\d+)", self.ptx)]
        taken = [int(n) for n in re.findall(r"setmaxnreg\.inc\.sync\.aligned\.u32\s+(\d+)", self.ptx)]
        assert len(given) == (len(taken) > 0)
        if taken:
            assert max(taken) * (self.warpgroups - 1) + given[0] <= self.registers * self.warpgroups <= 512


@dataclass(frozen=True, kw_only=True)
class HopperProgram:
    """What the compilers say of a program with kernels of ours."""

    compiled: Compiled
    """XLA's program; it cannot be called."""
    kernels: tuple[HopperKernel, ...]

    @property
    def ptx(self) -> str:
        """Of all kernels."""
        return "".join(kernel.ptx for kernel in self.kernels)

    @property
    def synchronisation(self) -> dict[str, tuple[int, set[int]]]:
        """Fences and waits of each kernel by its name."""
        return {kernel.name: (kernel.fences, kernel.waits) for kernel in self.kernels}

    @property
    def registers(self) -> int:
        """The most of any kernel."""
        return max(kernel.registers for kernel in self.kernels)

    @property
    def spill_bytes(self) -> int:
        """Of all kernels."""
        return sum(kernel.spill_bytes for kernel in self.kernels)


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


def _read(said: str) -> HopperKernel:
    """A kernel of its PTX, and of ptxas' report behind it."""

    def find(pattern: str) -> str:
        [found] = re.findall(pattern, said)
        return found

    kernel = HopperKernel(
        name=find(r"\.entry (\w+?)(?:_mosaic_gpu)?_kernel\("),
        ptx=said,
        warpgroups=int(find(r"\.maxntid (\d+)")) // 128,
        registers=int(find(r"Used (\d+) registers")),
        spill_bytes=int(find(r"bytes stack frame, (\d+) bytes spill stores")),
    )
    kernel.check_registers()
    return kernel


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
        # ptxas would wait after every product, or keep the registers where they are, and only say so.
        assert "serialized" not in said and "setmaxnreg ignored" not in said
        parts = re.split(r"(?m)^(?=\.version )", said)[1:]
        assert len(parts) == len(kernels) > 0
        return HopperProgram(compiled=compiled, kernels=tuple(map(_read, parts)))

    return compile_for
