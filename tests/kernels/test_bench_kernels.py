"""`scripts/bench_kernels.py` runs here with its smallest cases, and counts the bytes and operations that it says."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/bench_kernels.py"


@pytest.fixture
def cases(monkeypatch):
    """The module, imported as Python does when the script runs."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("kernel_cases")


def test_the_smallest_cases_run_and_say_which_part_of_the_bound_they_reach():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--smallest", "--json"], capture_output=True, text=True, env=environment, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert {"device", "platform", "jax", "jaxlib", "python", "commit"} < set(report)
    limits, rows = report["limits"], report["rows"]
    assert limits["flops_source"] == "measured"
    assert [(row["operation"], row["implementation"]) for row in rows] == [
        (operation, implementation)
        for operation in ("mla_attention", "gqa_attention", "grouped_mlp", "kv_update", "tree_verify")
        for implementation in ("xla", "reference")
    ]
    for row in rows:
        memory_s, compute_s = row["num_bytes"] / limits["bytes_per_s"], row["flops"] / limits["flops_per_s"]
        assert row["bound"] == ("memory" if memory_s >= compute_s else "compute")
        bound_us = 1e6 * max(memory_s, compute_s)
        # Both have four digits.
        assert row["bound_us"] == pytest.approx(bound_us, rel=1e-3)
        assert row["fraction_of_bound"] == pytest.approx(bound_us / row["us"], rel=2e-3)
        assert row.get("difference", 0) < 1e-5


def find(cases, operation, *words):
    [case] = [c for c in cases if c.operation == operation and all(word in c.shape.split() for word in words)]
    return case


def test_counted_work_is_that_of_closed_forms(cases):
    """Of contexts that are all full and experts that are all in use, written out."""
    gpu = list(cases.list_cases("gpu"))
    contexts, queries, results = 64 * 8192, 64 * 64 * 576 * 2, 64 * 64 * 512 * 2
    for dtype, size in (("bfloat16", 2), ("float8_e4m3fn", 1)):
        case = find(gpu, "mla_attention", "N=64", "Tq=1", "H=64", "context=8192", dtype)
        assert case.num_bytes == contexts * 576 * size + queries + results
        assert case.flops == contexts * 64 * 2 * (576 + 512)
        case = find(gpu, "gqa_attention", "N=4", "H=64/8", "context=32768", dtype)
        assert case.num_bytes == 4 * 32768 * 8 * 2 * 128 * size + 2 * 4 * 64 * 128 * 2
        assert case.flops == 4 * 32768 * 64 * 2 * 2 * 128
    # The first of eight tokens sees seven slots less than the last.
    verify = find(gpu, "mla_attention", "N=64", "Tq=8", "H=64", "context=8192", "bfloat16")
    assert verify.num_bytes == contexts * 576 * 2 + 8 * (queries + results)
    assert verify.flops == sum(64 * (8192 - back) for back in range(8)) * 64 * 2 * (576 + 512)
    slices = find(gpu, "mla_attention", "N=16", "Tq=16", "H=16")
    assert slices.num_bytes == 16 * (8192 * 576 + 16 * 16 * (576 + 512)) * 2
    assert slices.flops == 16 * sum(8192 - back for back in range(16)) * 16 * 2 * (576 + 512)
    # 256 tokens with 6 of 64 experts each leave none of them out.
    experts = find(gpu, "grouped_mlp", "T=256", "E=64")
    assert experts.num_bytes == 64 * 3 * 2048 * 1408 * 2 + 2 * 256 * 2048 * 2
    assert experts.flops == 256 * 6 * 2 * 3 * 2048 * 1408
    # A sixteenth of Kimi-K2's experts, 24; in float8 with a scale of 4 bytes per 128 x 128.
    shares = [find(gpu, "grouped_mlp", "T=256", "E=24", dtype) for dtype in ("bfloat16", "float8_e4m3fn")]
    assert shares[0].flops == shares[1].flops < 256 * 8 * 2 * 3 * 7168 * 2048 / 12
    weights, tokens = 24 * 3 * 7168 * 2048, 2 * 256 * 7168 * 2
    assert [case.num_bytes for case in shares] == [2 * weights + tokens, weights + weights // 128**2 * 4 + tokens]
    draw = find(gpu, "tree_verify", "E=64", "M=7168")
    assert draw.num_bytes == 7168 * 163_840 * 2 + 64 * (7168 * 2 + 28)
    assert draw.flops == 2 * 64 * 7168 * 163_840
    assert find(gpu, "kv_update", "bfloat16").num_bytes == 2 * 64 * 576 * 2


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_each_platform_times_its_own_kernel_beside_xla(cases, platform):
    for case in cases.list_cases(platform):
        # There is no kernel of ours for cache writes.
        expected = ["xla"] if case.operation == "kv_update" else [f"pallas_{platform}", "xla"]
        assert list(case.implementations) == expected
