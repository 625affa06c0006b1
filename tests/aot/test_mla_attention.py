"""The TPU kernel of paged latent attention compiles at real shapes, in the memory that it is counted to need."""

from functools import partial

import jax
import pytest

from kernels_pallas.mla_attention import pallas_tpu
from kernels_pallas.mla_attention.arg_specs import ArgSpec, arg_specs
from tests.aot.topology import DEFAULT_VMEM_LIMIT, GENERATIONS, compile_for

pytestmark = pytest.mark.aot
SPECS = {spec.name: spec for model in ("tiny", "moonlight", "kimi_k2") for spec in arg_specs(model)}


def compile_spec(generation: str, spec: ArgSpec, **options) -> jax.stages.Compiled:
    attend = partial(pallas_tpu.mla_attention_pallas_tpu, value_width=spec.value_width, scale=spec.scale, **options)
    return compile_for(generation, attend, *spec.args)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", SPECS)
def test_compiles_within_the_counted_vmem_and_copies_no_cache(generation, name, monkeypatch):
    spec, counted = SPECS[name], []
    count = pallas_tpu.count_vmem_bytes
    monkeypatch.setattr(
        pallas_tpu, "count_vmem_bytes", lambda *args, **kwargs: counted.append(count(*args, **kwargs)) or counted[-1]
    )
    temporaries = compile_spec(generation, spec).memory_analysis().temp_size_in_bytes
    assert len(counted) == 1 and counted[0] <= DEFAULT_VMEM_LIMIT
    print(f"AOT {generation} {name}: VMEM {counted[0] / 2**20:.2f} MiB, temporaries {temporaries / 1e6:.1f} MB")
    # At most: queries padded to whole lanes; float32 results and their log-sum-exp, twice if two cores share a context;
    # masks, 512 bytes a token; block tables.
    q, cache, tables, *_ = spec.args
    tokens, heads = q.shape[0] * q.shape[1], -(-q.shape[2] // 8) * 8
    padded_queries = tokens * heads * cache.shape[2] * q.dtype.itemsize
    partial_results = 2 * tokens * heads * (spec.value_width + 128) * 4 if generation == "v5p" else 0
    assert temporaries <= padded_queries + partial_results + 512 * tokens + 8 * tables.size + 2**18


def test_less_vmem_than_the_kernel_needs_is_refused_so_the_limit_is_enforced():
    spec = SPECS["kimi_k2-prefill-tp1"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_spec("v5e", spec, vmem_limit_bytes=4 * 2**20)


def test_unpadded_rows_would_copy_the_cache():
    """Why rows are padded: this is what the compiler does with 576 columns, and the kernel refuses them."""
    cache = jax.ShapeDtypeStruct((4096, 64, 576), "bfloat16")
    program = compile_for("v5e", lambda pages: jax.lax.optimization_barrier(pages)[7], cache)
    assert program.input_formats[0][0].layout.major_to_minor != (0, 1, 2)
    q, _, *others = SPECS["moonlight-decode-tp1"].args
    with pytest.raises(ValueError, match="576 wide"):
        compile_for("v5e", partial(pallas_tpu.mla_attention_pallas_tpu, value_width=512, scale=1.0), q, cache, *others)
