"""The GPU kernel of paged latent attention goes through the real compilers at real shapes; nothing runs."""

from functools import partial

import jax
import pytest

from kernels_pallas._paged.gpu import choose_splits
from kernels_pallas._paged.layout import FLOAT8
from kernels_pallas.mla_attention import mla_attention
from kernels_pallas.mla_attention.arg_specs import MODELS, arg_specs
from tests.aot.hopper import compile_for_hopper

__all__ = ["compile_for_hopper"]
pytestmark = pytest.mark.aot
SPECS = {spec.name: spec for model in ("moonlight", "kimi_k2") for spec in arg_specs(model)}


def compile_spec(compile_for_hopper, spec, page_size=64):
    """Compile for rows without a TPU's padding, in pages of so many."""
    q, cache, tables, *others = spec.args
    num_pages, rows, _ = cache.shape
    cache = jax.ShapeDtypeStruct((num_pages * rows // page_size, page_size, MODELS[spec.model].width), cache.dtype)
    tables = jax.ShapeDtypeStruct((tables.shape[0], tables.shape[1] * rows // page_size), tables.dtype)
    attend = partial(mla_attention, value_width=spec.value_width, scale=spec.scale, implementation="pallas_gpu")
    return compile_for_hopper(attend, q, cache, tables, *others)


@pytest.mark.parametrize("name", SPECS)
def test_compiles_to_hopper_code_that_spills_nothing_and_copies_no_cache(name, compile_for_hopper):
    spec = SPECS[name]
    program = compile_spec(compile_for_hopper, spec)
    temporaries = program.compiled.memory_analysis().temp_size_in_bytes
    print(f"AOT H200 {name}: {program.registers} registers, temporaries {temporaries / 1e6:.1f} MB")
    assert ".target sm_90a" in program.ptx
    # Products by wgmma, pages by the copy engine.
    assert "wgmma.mma_async" in program.ptx
    assert "cp.async.bulk.tensor" in program.ptx
    # Shown are what was made bfloat16, to wgmma, and sums of weights, to the copy engine; each product is waited for.
    fences = 1 + (spec.args[1].dtype == FLOAT8)
    assert program.synchronisation == {"mla_attention": (fences, {0})}
    assert program.spill_bytes == 0
    tiles, tokens, heads, width = spec.args[0].shape
    row_blocks = -(-tokens * heads // 64)
    cache, tables = spec.args[1:3]
    max_tokens, row_bytes = tables.shape[1] * cache.shape[1], width * cache.dtype.itemsize
    splits = choose_splits(tiles * row_blocks, max_tokens, spec.value_width, row_bytes)
    num_rows = tiles * row_blocks * 64
    # Queries in blocks of 64 rows, limits and masks of rows, results in such blocks and of each part in float32.
    parts = splits * num_rows * (spec.value_width + 1) * 4 if splits > 1 else 0
    assert parts < 70e6
    parts = parts or num_rows * spec.value_width * 2
    assert temporaries <= num_rows * (width * 2 + 8) + parts + 2**20


@pytest.mark.parametrize("suffix", ["", "-fp8"])
@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_other_pages_compile_without_spilling(page_size, suffix, compile_for_hopper):
    assert compile_spec(compile_for_hopper, SPECS["moonlight-verify-tp1" + suffix], page_size).spill_bytes == 0


@pytest.mark.parametrize(("width", "value_width", "row_width"), [(192, 128, 192), (448, 384, 448), (576, 512, 640)])
def test_other_widths_that_are_not_refused_compile(width, value_width, row_width, compile_for_hopper):
    q, cache, *others = SPECS["moonlight-verify-tp1"].args
    q = jax.ShapeDtypeStruct((*q.shape[:3], width), q.dtype)
    cache = jax.ShapeDtypeStruct((*cache.shape[:2], row_width), cache.dtype)
    attend = partial(mla_attention, value_width=value_width, scale=0.1, implementation="pallas_gpu")
    assert compile_for_hopper(attend, q, cache, *others).spill_bytes == 0
