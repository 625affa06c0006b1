"""The TPU kernel of paged latent attention compiles at real shapes, in the memory that it is counted to need."""

import time
from functools import partial

import jax
import pytest

from kernels_pallas._paged import tpu
from kernels_pallas._paged.layout import FLOAT8
from kernels_pallas._paged.sizes import count_vmem_bytes
from kernels_pallas.mla_attention import pallas_tpu
from kernels_pallas.mla_attention.arg_specs import ArgSpec, arg_specs
from tests.aot.topology import DEFAULT_VMEM_LIMIT, GENERATIONS, compile_for, slow_but

pytestmark = pytest.mark.aot
SPECS = {spec.name: spec for model in ("tiny", "moonlight", "kimi_k2") for spec in arg_specs(model)}
QUICK = [name for name, spec in SPECS.items() if spec.cache_dtype != FLOAT8 or spec.tensor_parallel == 1]
"""Float8 caches at one degree."""


def compile_spec(generation: str, spec: ArgSpec, **options) -> jax.stages.Compiled:
    attend = partial(pallas_tpu.mla_attention_pallas_tpu, value_width=spec.value_width, scale=spec.scale, **options)
    return compile_for(generation, attend, *spec.args)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", slow_but(QUICK, SPECS))
def test_compiles_within_the_counted_vmem_and_copies_no_cache(generation, name, monkeypatch):
    spec, counted = SPECS[name], []

    def count(sizes):
        counted.append((count_vmem_bytes(sizes), sizes.is_split))
        return counted[-1][0]

    monkeypatch.setattr(tpu, "count_vmem_bytes", count)
    started = time.perf_counter()
    temporaries = compile_spec(generation, spec).memory_analysis().temp_size_in_bytes
    print(
        f"AOT {generation} {name}: {time.perf_counter() - started:.1f} s, VMEM {counted[0][0] / 2**20:.2f} MiB, "
        f"temporaries {temporaries / 1e6:.1f} MB"
    )
    [(vmem_bytes, is_split)] = counted
    assert vmem_bytes <= DEFAULT_VMEM_LIMIT
    # At most: queries padded to whole lanes; where two cores share each context, both parts and their sum in float32
    # with the log-sum-exp in a column of 128 lanes; masks, 512 bytes a token; small arrays.
    q, cache, *_ = spec.args
    tokens, heads = q.shape[0] * q.shape[1], -(-q.shape[2] // 8) * 8
    padded_queries = tokens * heads * cache.shape[2] * q.dtype.itemsize
    parts = 3 * tokens * heads * (spec.value_width + 128) * 4 if is_split else 0
    assert temporaries <= padded_queries + parts + 512 * tokens + 2**20


def test_two_cores_of_a_device_share_the_context_of_few_tiles():
    """Then the partial results of two parts of each context are a second output, and combined."""
    results = {
        generation: compile_spec(generation, SPECS["kimi_k2-tail-tp1"]).memory_analysis().temp_size_in_bytes
        for generation in ("v5e", "v5p")
    }
    assert results["v5p"] >= 2 * 4 * 64 * 512 * 4 > results["v5e"]


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
