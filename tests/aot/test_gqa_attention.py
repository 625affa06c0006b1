"""The TPU kernel of paged grouped-query attention compiles at Qwen2-72B's shapes, in the memory that it is counted to
need."""

import time
from functools import partial

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas._paged import tpu as paged_tpu
from kernels_pallas._paged.layout import FLOAT8
from kernels_pallas._paged.sizes import count_vmem_bytes
from kernels_pallas.gqa_attention.arg_specs import ArgSpec, arg_specs
from kernels_pallas.gqa_attention.pallas_tpu import gqa_attention_pallas_tpu
from tests.aot.topology import DEFAULT_VMEM_LIMIT, GENERATIONS, compile_for, slow_but, tpu

pytestmark = pytest.mark.aot
SPECS = {spec.name: spec for model in ("tiny", "qwen2_72b") for spec in arg_specs(model)}
QUICK = [name for name, spec in SPECS.items() if spec.cache_dtype != FLOAT8 or spec.tensor_parallel == 1]
"""Float8 caches at one degree."""


def compile_spec(generation: str, spec: ArgSpec, **options) -> jax.stages.Compiled:
    return compile_for(generation, partial(gqa_attention_pallas_tpu, scale=spec.scale, **options), *spec.args)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", slow_but(QUICK, SPECS))
def test_compiles_within_the_counted_vmem_and_copies_no_cache(generation, name, monkeypatch):
    spec, counted = SPECS[name], []

    def count(sizes):
        counted.append((count_vmem_bytes(sizes), sizes))
        return counted[-1][0]

    monkeypatch.setattr(paged_tpu, "count_vmem_bytes", count)
    started = time.perf_counter()
    temporaries = compile_spec(generation, spec).memory_analysis().temp_size_in_bytes
    [(vmem_bytes, sizes)] = counted
    print(
        f"AOT {generation} {name}: {time.perf_counter() - started:.1f} s, {sizes.kv_heads} x {sizes.rows} rows, blocks "
        f"of {sizes.block_tokens}, VMEM {vmem_bytes / 2**20:.2f} MiB, temporaries {temporaries / 1e6:.1f} MB"
    )
    assert vmem_bytes <= DEFAULT_VMEM_LIMIT
    # At most: queries and results with KV heads before tokens, in whole registers; where two cores share each context,
    # both parts and their sum in float32 with the log-sum-exp in a column of 128 lanes; masks; small arrays.
    q, *_ = spec.args
    tokens, rows = q.shape[0] * q.shape[1], q.shape[0] * q.shape[1] * q.shape[2] * (8 if "tiny" in name else 1)
    swapped = 2 * rows * 128 * q.dtype.itemsize
    parts = 3 * rows * (128 + 128) * 4 if sizes.is_split else 0
    assert temporaries <= swapped + parts + 512 * tokens + 2**20


def test_all_nodes_of_the_largest_tree_read_the_context_once():
    """33 tokens x 8 heads of each of 8 KV heads: a cut would read every page again."""
    counted = []
    with pytest.MonkeyPatch.context() as patch, tpu("v5e"):
        patch.setattr(paged_tpu, "count_vmem_bytes", lambda sizes: counted.append(sizes) or count_vmem_bytes(sizes))
        spec = SPECS["qwen2_72b-tail_verify-tp1"]
        jax.eval_shape(partial(gqa_attention_pallas_tpu, scale=spec.scale), *spec.args)
    assert [(sizes.kv_heads, sizes.rows) for sizes in counted] == [(8, 33 * 8)]


def test_less_vmem_than_the_kernel_needs_is_refused_so_the_limit_is_enforced():
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_spec("v5e", SPECS["qwen2_72b-prefill-tp1"], vmem_limit_bytes=3 * 2**20)


def test_devices_with_some_of_the_kv_heads_each_need_no_word_from_the_others():
    """Four devices, two KV heads each: the cache is split along its rows, and nothing is sent."""
    spec = SPECS["qwen2_72b-decode-tp1"]
    heads, columns, everywhere = PartitionSpec(None, None, "x"), PartitionSpec(None, None, "x"), PartitionSpec()
    with tpu("v5e", (4,)) as mesh:
        specs = (heads, columns, everywhere, everywhere)
        args = [
            jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=NamedSharding(mesh, where))
            for arg, where in zip(spec.args, specs, strict=False)
        ]
        attend = jax.shard_map(
            lambda *a: gqa_attention_pallas_tpu(*a, None, None, scale=spec.scale),
            mesh=mesh,
            in_specs=specs,
            out_specs=heads,
            check_vma=False,
        )
        program = jax.jit(attend).lower(*args).compile()
    text = program.as_text()
    assert "gqa_attention" in text
    assert not [word for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all") if word in text]
    whole = spec.args[1].size * 2
    assert whole / 4 <= program.memory_analysis().argument_size_in_bytes < whole / 3
