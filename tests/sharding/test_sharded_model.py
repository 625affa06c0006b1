"""A model spread over devices computes what it computes on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from seer_jax.config.schema import ShardingConfig
from seer_jax.models import decoder
from seer_jax.models.specs import decoder_specs
from seer_jax.sharding import make_mesh, shardings_for
from tests.models.oracles import load_case
from tests.quick import quick_jit

config, params, oracle = load_case("k2")
mesh = make_mesh(ShardingConfig(**json.loads(sys.argv[1])), jax.devices())
params = jax.device_put(params, shardings_for(decoder_specs(config, jnp.float32), mesh))

def loss(params, ids):
    logits = decoder.project_logits(params, config, decoder.forward_train(params, config, ids))
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1)), logits

(nll, logits), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(params, oracle["input_ids"])
experts = params["layers"][1]["moe"]["gate_up"]
lm_head = oracle["grad/lm_head.weight"].T
print(json.dumps({
    "logit_error": float(np.abs(logits - oracle["logits"]).max()),
    "grad_error": float(np.abs(grads["lm_head"] - lm_head).max() / np.abs(lm_head).max()),
    "expert_shard": experts.sharding.shard_shape(experts.shape),
    "num_devices": len(experts.sharding.device_set),
}))
"""


@pytest.mark.parametrize(
    ("mesh", "expert_shard"),
    [({"tensor": 2, "expert": 2}, [6, 48, 16]), ({"data": 2, "tensor": 4}, [12, 48, 8])],
    ids=["tensor 2 x expert 2", "data 2 x tensor 4"],
)
def test_sharded_logits_and_gradients_equal_the_reference(mesh, expert_shard):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(mesh)],
        env=env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["logit_error"] < 1e-4
    assert result["grad_error"] < 1e-4
    assert result["expert_shard"] == expert_shard
    assert result["num_devices"] == mesh.get("data", 1) * mesh.get("tensor", 1) * mesh.get("expert", 1)
