"""An instance on several devices: the tokens of one device, caches that stay where they are, KV that fits others."""

import subprocess
import sys
from pathlib import Path

import pytest

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


MIGRATION = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
from dataclasses import replace
import jax, numpy as np
from seer_jax.config.schema import ShardingConfig
from seer_jax.engine import kv_transfer
from seer_jax.engine.engine import Engine
from seer_jax.sharding import make_mesh
from tests.engine import tiny
from tests.engine.test_paused_kv import SharedPool

pool = SharedPool(1 << 24)
engines = [
    Engine(tiny.MODEL, tiny.params(), tiny.CONFIG, instance_id=i, kv_pool=pool,
           mesh=make_mesh(ShardingConfig(tensor=1 + i), jax.devices()))
    for i in range(2)
]
whole = tiny.chunk(tiny.prompt(0, 9), max_chunk=60, max_tokens=60)
known, kv, left, logprobs = whole.token_ids, None, None, []
for part in range(4):  # From one device to two and back through the pool, then from instance to instance.
    engine = engines[part % 2]
    engine.submit(tiny.chunk(known, num_prompt=9, max_tokens=60, chunk_index=part, max_chunk=15, kv=kv))
    event = tiny.drain(engine)[0]
    known, logprobs = np.concatenate([known, event.token_ids]), [*logprobs, *event.logprobs]
    if event.kv is None:
        break
    if part == 1:
        kv_transfer.HOST_PLATFORMS = ()  # From now on through pinned memory, as from an accelerator.
    taken = engine.take_kv(whole.request_id)
    if left is not None:  # What came out of the pool lies here as it was there, bit for bit.
        rows = [np.swapaxes(k.pages, 1, 2).reshape(-1, *taken.pages.shape[1::2])[: left.num_tokens]
                for k in (left, taken)]
        assert rows[0].tobytes() == rows[1].tobytes(), part
    left = taken
    kv = replace(event.kv, ref=None if part < 2 else taken)
assert part == 3
tokens, expected = tiny.reference_decode(whole)
assert known[9:].tolist() == tokens
np.testing.assert_allclose(logprobs, expected, atol=1e-4)
figures = [engine.status() for engine in engines]
assert [f.num_prefilled_tokens for f in figures] == [9, 0] and not any(f.num_reprefilled_tokens for f in figures)
assert [len(engine._caches[0].devices()) for engine in engines] == [1, 2]
"""


@pytest.mark.parametrize("script", [SCRIPT, MIGRATION], ids=["tokens of one device", "KV moves between degrees"])
def test_tensor_and_expert_parallel_engines(script: str) -> None:
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]
