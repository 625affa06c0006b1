"""The TPU kernel goes through the real compiler, at the shapes of real models; nothing runs."""

import functools
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.tree_verify import pallas_tpu, tree_verify
from kernels_pallas.tree_verify.arg_specs import ARG_SPECS, KIMI_K2, MOONLIGHT, QWEN2_72B, TINY, ArgSpec

pytestmark = pytest.mark.aot

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def devices(chip):
    """Eight devices of a chip that is not there."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    description = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return np.array(description.devices)[:8]


def compile_for(chip, spec):
    """Compile a device's share of a shape: all eight devices hold a share each, or one holds all."""
    mesh = Mesh(devices(chip)[: spec.shards], ("vocab",))
    draw = functools.partial(tree_verify, axis_name="vocab" if spec.shards > 1 else None, implementation="pallas_tpu")
    in_specs = (P(), P(None, "vocab"), P(), P(), P())
    run = jax.shard_map(draw, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    args = []
    for arg, sharding in zip(spec.args(), in_specs, strict=True):
        shape = tuple(
            n * (spec.shards if name else 1) for n, name in zip(arg.shape, (*sharding, None, None), strict=False)
        )
        args.append(jax.ShapeDtypeStruct(shape, arg.dtype, sharding=NamedSharding(mesh, sharding)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(run).lower(*args)
    assert lowered.as_text().count("tpu_custom_call") == 1
    return lowered.compile()


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", [*MOONLIGHT, *KIMI_K2, *QWEN2_72B])
def test_compiles_without_an_array_of_logits(chip, name):
    spec = ARG_SPECS[name]
    compiled = compile_for(chip, spec)
    memory = compiled.memory_analysis()
    head = spec.width * spec.vocab // spec.shards * 2
    assert head <= memory.argument_size_in_bytes < 1.01 * head + 5e6
    # What lanes hold for the last combination and padding, not [rows, vocabulary]: 168 MB, or 21 MB of a shard.
    assert memory.temp_size_in_bytes < 8e6


def test_the_compiler_notices_a_tile_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILE_BYTES", 128 << 20)
    monkeypatch.setattr(pallas_tpu, "MAX_TILE", 16_384)
    with pytest.raises(Exception, match=r"vmem|VMEM"):
        compile_for("v5e", ArgSpec(rows=16, width=7168, vocab=163_840))


@pytest.mark.parametrize("name", TINY)
def test_compiles_at_tiny_shapes(name):
    assert compile_for("v5e", TINY[name]).memory_analysis().temp_size_in_bytes < 8e6
