"""The GPU kernel of paged grouped-query attention goes through the real compilers at real shapes; nothing runs."""

from functools import partial

import jax
import pytest

from kernels_pallas._paged.gpu import choose_splits
from kernels_pallas._paged.layout import FLOAT8
from kernels_pallas.gqa_attention import gqa_attention
from kernels_pallas.gqa_attention.arg_specs import arg_specs
from tests.aot.hopper import compile_for_hopper

__all__ = ["compile_for_hopper"]
pytestmark = pytest.mark.aot
SPECS = {spec.name: spec for spec in arg_specs("qwen2_72b")}


@pytest.mark.parametrize("name", SPECS)
def test_compiles_to_hopper_code_that_spills_nothing_and_copies_no_cache(name, compile_for_hopper):
    spec = SPECS[name]
    program = compile_for_hopper(partial(gqa_attention, scale=spec.scale, implementation="pallas_gpu"), *spec.args)
    temporaries = program.compiled.memory_analysis().temp_size_in_bytes
    print(f"AOT H200 {name}: {program.registers} registers, temporaries {temporaries / 1e6:.1f} MB")
    assert ".target sm_90a" in program.ptx
    assert "wgmma.mma_async" in program.ptx
    assert "cp.async.bulk.tensor" in program.ptx
    # Shown are what was made bfloat16, to wgmma, and sums of weights, to the copy engine; each product is waited for.
    fences = 1 + (spec.args[1].dtype == FLOAT8)
    assert program.synchronisation == {"gqa_attention": (fences, {0})}
    assert program.spill_bytes == 0
    q, cache, tables, *_ = spec.args
    tiles, tokens, heads, head_dim = q.shape
    kv_heads = cache.shape[2] // (2 * head_dim)
    row_blocks = -(-tokens * heads // kv_heads // 64)
    blocks = tiles * kv_heads * row_blocks
    max_tokens, row_bytes = tables.shape[1] * cache.shape[1], 2 * head_dim * cache.dtype.itemsize
    splits = choose_splits(blocks, max_tokens, head_dim, row_bytes)
    # Queries and results in blocks of 64 rows, KV heads before tokens; results of each part in float32; limits, masks.
    parts = splits * blocks * 64 * (head_dim + 1) * 4 if splits > 1 else 0
    assert parts < 70e6
    assert temporaries <= 2 * blocks * 64 * (head_dim * 2 + 8) + parts + 2**20


@pytest.mark.parametrize("head_dim", [64, 192, 256])
def test_other_heads_that_are_not_refused_compile(head_dim, compile_for_hopper):
    q, cache, *others = SPECS["qwen2_72b-verify-tp8"].args
    q = jax.ShapeDtypeStruct((*q.shape[:3], head_dim), q.dtype)
    cache = jax.ShapeDtypeStruct((*cache.shape[:2], 2 * head_dim), cache.dtype)
    attend = partial(gqa_attention, scale=0.1, implementation="pallas_gpu")
    assert compile_for_hopper(attend, q, cache, *others).spill_bytes == 0
