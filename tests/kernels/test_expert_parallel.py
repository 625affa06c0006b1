"""Experts divided over eight devices compute what they compute on one, whatever the load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from kernels_pallas.grouped_matmul import expert_parallel_mlp, grouped_mlp, quantise_blocks
from kernels_pallas.grouped_matmul import api
from kernels_pallas.grouped_matmul.pallas_tpu import grouped_mlp_pallas_tpu
from tests.kernels.test_grouped_mlp import make_case
from tests.quick import quick_jit

api.IMPLEMENTATIONS["interpreted"] = partial(grouped_mlp_pallas_tpu, interpret=True)
TOKENS, EXPERTS, CHOSEN = 24, 16, 3
mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
plain = partial(grouped_mlp, implementation="reference")
reference = quick_jit(plain)

def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    '''What jax documents and XLA:CPU lacks; NaN if sender and receiver disagree on a size.'''
    operands, starts, sizes, landings = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(operand))
    for source in range(len(operands)):
        place = jnp.where(row < sizes[source, me], landings[source, me] + row, len(output))
        output = output.at[place].set(operands[source, starts[source, me] + row], mode="drop")
    return jnp.where(jnp.all(recv_sizes == sizes[:, me]), output, jnp.nan)

jax.lax.ragged_all_to_all = ragged_all_to_all

def build(way, implementation, num_arrays):
    options = dict(tokens_are_sharded=way != "replicated", exchange=None if way == "replicated" else way)
    run = partial(expert_parallel_mlp, axis_name="expert", implementation=implementation, **options)
    tokens = P() if way == "replicated" else P("expert")
    specs = (tokens,) * 3 + (P("expert"),) * (num_arrays - 3)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)

rng = np.random.default_rng(0)
even = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOSEN]
loads = {
    "even": even,
    "all at one shard": np.tile([5, 4, EXPERTS], (TOKENS, 1)),
    "all at two": np.tile([15, 0, 14], (TOKENS, 1)),
    "one token": np.where(np.arange(TOKENS)[:, None] == 7, even, EXPERTS),
    "nobody": np.full((TOKENS, CHOSEN), EXPERTS),
}
x, _, weights, *experts = make_case(TOKENS, EXPERTS, CHOSEN, model=128, ffn=128)
(gate_up, gate_up_scale), (down, down_scale) = map(quick_jit(quantise_blocks), experts)
errors, ids = {}, jnp.asarray(even, jnp.int32)

def error(got, expected):
    expected = np.asarray(expected)
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))

def gradient(run):
    def loss(x, weights, *experts):
        return jnp.sum(jnp.sin(run(x, ids, weights, *experts)))
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, weights, *experts)

gradient_of_reference = gradient(plain)
for way in ("replicated", "padded", "ragged"):
    divided = build(way, None, 5)
    run = quick_jit(divided)
    for load, chosen in loads.items():
        case = (x, jnp.asarray(chosen, jnp.int32), weights, *experts)
        errors[f"{load}, {way}"] = error(run(*case), reference(*case))
    if way != "ragged":
        errors[f"gradient, {way}"] = max(map(error, gradient(divided), gradient_of_reference))
wrong = error(run(x, ids[::-1], weights, *experts), reference(x, ids, weights, *experts))
case = (x, ids, weights, gate_up, down, gate_up_scale, down_scale)
errors["kernel, float8, ragged"] = error(quick_jit(build("ragged", "interpreted", 7))(*case), reference(*case))
print(json.dumps({"errors": errors, "wrong": wrong}))
"""


@pytest.fixture(scope="module")
def result():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_all_ways_equal_the_reference_for_every_load_and_in_their_gradients(result):
    assert len(result["errors"]) == 18
    print(result["errors"])
    assert max(result["errors"].values()) < 2e-6


def test_the_comparison_notices_another_routing(result):
    assert result["wrong"] > 0.01
