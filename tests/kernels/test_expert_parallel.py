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
reference = quick_jit(partial(grouped_mlp, implementation="reference"))

def build(sharded, implementation, num_arrays):
    run = partial(expert_parallel_mlp, axis_name="expert", tokens_are_sharded=sharded, implementation=implementation)
    tokens = P("expert") if sharded else P()
    specs = (tokens,) * 3 + (P("expert"),) * (num_arrays - 3)
    return quick_jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False))

rng = np.random.default_rng(0)
even = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOSEN]
loads = {
    "even": even,
    "all at one shard": np.tile([5, 4, EXPERTS], (TOKENS, 1)),
    "all at two": np.tile([15, 0, 14], (TOKENS, 1)),
    "one token": np.where(np.arange(TOKENS)[:, None] == 7, even, EXPERTS),
    "nobody": np.full((TOKENS, CHOSEN), EXPERTS),
}
def error(run, case):
    return float(np.abs(run(*case) - reference(*case)).max())

x, _, weights, *experts = make_case(TOKENS, EXPERTS, CHOSEN, model=128, ffn=128)
(gate_up, gate_up_scale), (down, down_scale) = map(quantise_blocks, experts)
errors = {}
for sharded in (False, True):
    run = build(sharded, None, 5)
    for load, ids in loads.items():
        errors[f"{load}, sharded {sharded}"] = error(run, (x, jnp.asarray(ids, jnp.int32), weights, *experts))
    ids = jnp.asarray(even, jnp.int32)
    case = (x, ids, weights, gate_up, down, gate_up_scale, down_scale)
    errors[f"kernel, float8, sharded {sharded}"] = error(build(sharded, "interpreted", 7), case)
    def loss(run, x, weights, *experts):
        return jnp.sum(jnp.sin(run(x, ids, weights, *experts)))
    arrays = (x, weights, *experts)
    got, expected = (quick_jit(jax.grad(partial(loss, f), argnums=(0, 1, 2, 3)))(*arrays) for f in (run, reference))
    errors[f"gradient, sharded {sharded}"] = max(float(np.abs(a - b).max()) for a, b in zip(got, expected))
wrong = (x, ids[::-1], weights, *experts)
print(json.dumps({"errors": errors, "wrong": float(np.abs(run(*wrong) - reference(x, ids, weights, *experts)).max())}))
"""


@pytest.fixture(scope="module")
def result():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_both_ways_equal_the_reference_for_every_load_and_in_their_gradients(result):
    assert len(result["errors"]) == 14
    assert max(result["errors"].values()) < 3e-6, result["errors"]


def test_the_comparison_notices_another_routing(result):
    assert result["wrong"] > 0.01
