"""The GPU kernels of the expert MLP go through the real compilers at real shapes; nothing runs."""

from functools import partial

import pytest

from kernels_pallas.grouped_matmul import grouped_mlp
from kernels_pallas.grouped_matmul.arg_specs import arg_specs
from tests.aot.hopper import compile_for_hopper

__all__ = ["compile_for_hopper"]
pytestmark = pytest.mark.aot
SPECS = {spec.name: spec for model in ("moonlight", "kimi_k2") for spec in arg_specs(model)}


@pytest.mark.parametrize("name", SPECS)
def test_compiles_to_hopper_code_that_spills_nothing_and_copies_no_expert(name, compile_for_hopper):
    spec = SPECS[name]
    program = compile_for_hopper(partial(grouped_mlp, implementation="pallas_gpu"), *spec.args)
    temporaries = program.compiled.memory_analysis().temp_size_in_bytes
    print(f"AOT H200 {name}: {program.registers} registers, temporaries {temporaries / 1e6:.1f} MB")
    assert program.ptx.count(".target sm_90a") == 2
    assert "wgmma.mma_async" in program.ptx
    assert "cp.async.bulk.tensor" in program.ptx
    assert ("cvt.rn.f16x2.e4m3x2" in program.ptx) == spec.is_quantised
    # What was made bfloat16 is shown to wgmma; while a slab is multiplied the products before it are done.
    fences = int(spec.is_quantised)
    assert program.synchronisation == {"grouped_gate_up": (fences, {0, 2}), "grouped_down": (fences, {0, 1})}
    assert program.spill_bytes == 0
    x, ids, _, _, down, *_ = spec.args
    experts, ffn, width = down.shape
    assignments = x.shape[0] * min(ids.shape[1], experts)
    rows = 64 * min(assignments, assignments // 64 + experts)
    # Gathered tokens, hidden rows and outputs of the padded tiles; what each token chose of them, in float32.
    assert temporaries <= rows * (2 * width + ffn) * 2 + 2 * ids.size * width * 4 + 2**21
