"""The GPU kernel of the draw goes through the real compilers, at the shapes of real models; nothing runs."""

from functools import partial

import jax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.tree_verify import pallas_gpu, tree_verify
from kernels_pallas.tree_verify.arg_specs import ARG_SPECS, KIMI_K2, MOONLIGHT, QWEN2_72B, ArgSpec
from tests.aot.hopper import compile_for_hopper, devices

__all__ = ["compile_for_hopper"]
pytestmark = pytest.mark.aot
DECODE = {f"{rows} rows": ArgSpec(rows=rows, width=2048, vocab=163_840) for rows in (16, 128, 192)}
SPECS = {name: ARG_SPECS[name] for name in (*MOONLIGHT, *KIMI_K2, *QWEN2_72B)} | DECODE


@pytest.mark.parametrize("name", SPECS)
def test_compiles_to_hopper_code_without_an_array_of_logits(name, compile_for_hopper):
    spec = SPECS[name]
    program = compile_for_hopper(partial(tree_verify, implementation="pallas_gpu"), *spec.args())
    memory = program.compiled.memory_analysis()
    print(f"AOT H200 {name}: {program.registers} registers, {program.spill_bytes} bytes spilled, {memory}")
    assert ".target sm_90a" in program.ptx
    # Products by wgmma, operands by the copy engine.
    assert "wgmma.mma_async" in program.ptx
    assert "cp.async.bulk.tensor" in program.ptx
    # Shown to the copy engine is what a block would draw; while a slab is multiplied the one before it is done.
    assert program.synchronisation == {"tree_verify": (1, {0, 1})}
    # With five warpgroups 96 registers are a thread's share at launch, and a few values move to memory.
    assert program.spill_bytes <= (32 if spec.rows > 192 else 0)
    head = spec.width * spec.vocab // spec.shards * 2
    assert head <= memory.argument_size_in_bytes < 1.01 * head + 5e6
    # What thread blocks hold for the last combination and padding, not [rows, vocabulary]: 168 MB, or 21 MB of a shard.
    assert memory.temp_size_in_bytes < 2e6 + 2 * spec.rows * spec.width


def test_the_compiler_notices_more_shared_memory_than_there_is(compile_for_hopper, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "SMEM_BYTES", 240 << 10)
    with pytest.raises(Exception, match=r"(?i)smem|shared memory"):
        compile_for_hopper(partial(tree_verify, implementation="pallas_gpu"), *SPECS["16 rows"].args())


def test_eight_gpus_share_a_vocabulary_with_one_all_reduce():
    mesh = Mesh(devices(8), ("vocab",))
    draw = partial(tree_verify, axis_name="vocab", implementation="pallas_gpu")
    in_specs = (P(), P(None, "vocab"), P(), P(), P())
    hidden, head, *keyed = MOONLIGHT["moonlight tp8"].args()
    shapes = (hidden, jax.ShapeDtypeStruct((head.shape[0], 8 * head.shape[1]), head.dtype), *keyed)
    args = [
        jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=NamedSharding(mesh, sharding))
        for arg, sharding in zip(shapes, in_specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.shard_map(draw, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
        text = jax.jit(run).lower(*args).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 1
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1


@pytest.mark.parametrize("vocab", [64, 576])
def test_the_smallest_shapes_compile(vocab, compile_for_hopper):
    spec = ArgSpec(rows=1, width=64, vocab=vocab)
    compile_for_hopper(partial(tree_verify, implementation="pallas_gpu"), *spec.args())
