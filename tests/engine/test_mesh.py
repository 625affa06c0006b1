"""An instance on several devices: the tokens of one device, and caches that stay where they are."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from seer_jax.config.schema import ShardingConfig
from seer_jax.engine.engine import Engine
from seer_jax.sharding import make_mesh
from tests.engine import tiny

mesh = make_mesh(ShardingConfig(expert=2, tensor=2), jax.devices())
engine = Engine(tiny.MODEL, tiny.params(), tiny.CONFIG, mesh=mesh)
whole = [tiny.chunk(tiny.prompt(i, 4 + 7 * i), index=i) for i in range(3)]
known, kv, got = [c.token_ids for c in whole], [None] * 3, [[], [], []]
for part in range(2):  # two chunks each, so that KV leaves the mesh and comes back
    for i in range(3):
        engine.submit(tiny.chunk(
            known[i], num_prompt=len(whole[i].token_ids), index=i, chunk_index=part, max_chunk=10, kv=kv[i]
        ))
    for i, event in tiny.drain(engine).items():
        got[i] += event.token_ids.tolist()
        known[i], kv[i] = np.concatenate([known[i], event.token_ids]), event.kv
for i in range(3):
    assert got[i] == tiny.reference_decode(whole[i])[0], i
assert engine.status().num_prefilled_tokens == sum(len(c.token_ids) for c in whole)
experts = engine.params["layers"][1]["moe"]["gate_up"]
assert experts.addressable_shards[0].data.shape[0] == tiny.MODEL.n_routed_experts // 4
"""


def test_tensor_and_expert_parallel_engine_gives_the_tokens_of_one_device() -> None:
    finished = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]
