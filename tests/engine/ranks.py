"""Checks of an engine with data-parallel ranks, for a process that has several devices: see `test_ranks`."""

import dataclasses
import json
import sys
import traceback

import jax
import numpy as np

from seer_jax.config.schema import RolloutConfig, ShardingConfig, SpeculationConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import ChunkFinished
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import KVHandle, RequestChunk, SamplingParams
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.rollout import RolloutRunner, RolloutStats
from seer_jax.engine.step_times import get_step_times
from seer_jax.kvpool import KVPool
from seer_jax.sharding import make_mesh
from tests.engine import tiny
from tests.engine.test_engine import count_compilations
from tests.engine.test_paused_kv import SharedPool

MESH = ShardingConfig(**json.loads(sys.argv[1])) if __name__ == "__main__" else ShardingConfig()
SMALL = dataclasses.replace(tiny.CONFIG, max_model_len=32, deterministic=True)
"""Two slots a rank, and one program in each mode."""
COLD = SamplingParams(max_tokens=16, temperature=0.3)
"""Makes the random model repeat itself, so that drafts are often right."""


def make_engine(
    mode: str = "off",
    *,
    budget: str = "fixed",
    sharding: ShardingConfig = MESH,
    instance_id: int = 0,
    kv_pool: KVPool | None = None,
    **changes: object,
) -> Engine:
    return Engine(
        tiny.MODEL,
        tiny.params(),
        dataclasses.replace(SMALL, **changes),
        speculation=SpeculationConfig(mode=mode, max_draft_tokens=4, min_probability=0.0, budget=budget),
        instance_id=instance_id,
        kv_pool=kv_pool,
        mesh=make_mesh(sharding, jax.devices()),
    )


def run(engine: Engine, chunks: list[RequestChunk]) -> dict[int, ChunkFinished]:
    for chunk in chunks:
        engine.submit(chunk)
    return tiny.drain(engine)


def check_steps_with_tiles() -> None:
    """Prompts in tiles beside decode rows, and chunks that go on where they were."""
    engine = make_engine(deterministic=False, max_model_len=tiny.CONFIG.max_model_len)
    whole = [tiny.chunk(tiny.prompt(i, 4 + 7 * i), index=i) for i in range(5)]
    known, kv, got = [c.token_ids for c in whole], [None] * 5, [[] for _ in whole]
    for part in range(2):
        chunks = [
            tiny.chunk(known[i], num_prompt=4 + 7 * i, index=i, chunk_index=part, max_chunk=10, kv=kv[i])
            for i in range(5)
        ]
        for i, event in run(engine, chunks).items():
            got[i] += event.token_ids.tolist()
            known[i], kv[i] = np.concatenate([known[i], event.token_ids]), event.kv
    assert got == [tiny.reference_decode(chunk)[0] for chunk in whole]
    assert engine.status().num_reprefilled_tokens == 0
    cache, experts = engine._caches[0], engine.params["layers"][1]["moe"]["gate_up"]
    assert cache.addressable_shards[0].data.shape[0] == tiny.CONFIG.num_pages // MESH.data
    assert experts.addressable_shards[0].data.shape[0] == tiny.MODEL.n_routed_experts // (MESH.data * MESH.tensor)


def check_shared_prompts() -> None:
    """Siblings on a rank compute their prompt once, its last token each as a decode row."""
    engine = make_engine()
    chunks = [tiny.chunk(tiny.prompt(0, 11), index=i) for i in range(4)]
    tiny.check_against_reference(chunks, run(engine, chunks))
    status = engine.status()
    assert (status.num_prefilled_tokens, status.num_shared_tokens) == (MESH.data * 10, (4 - MESH.data) * 10)


def verify_drafts(mode: str) -> None:
    """Verified on each rank, also where one has nothing to verify."""
    engine = make_engine(mode)
    chunks = [tiny.chunk(tiny.prompt(0, 9), index=i, sampling=COLD, max_tokens=16) for i in range(5)]
    tiny.check_against_reference(chunks, run(engine, chunks))
    assert engine.status().num_accepted_tokens > 0


def check_lines() -> None:
    verify_drafts("grouped")


def check_trees() -> None:
    verify_drafts("grouped_tree")


def check_expert_ids() -> None:
    """Those of one device, of requests on either rank, whether a plain step or a verification drew the token."""
    chunks = [tiny.chunk(tiny.prompt(i // 2, 9), index=i, sampling=COLD, max_tokens=16) for i in range(5)]
    engines = make_engine("grouped_tree", expert_ids=True), make_engine(sharding=ShardingConfig(), expert_ids=True)
    on_ranks, on_one = (run(engine, chunks) for engine in engines)
    for i, expected in on_one.items():
        assert on_ranks[i].token_ids.tolist() == expected.token_ids.tolist()
        assert expected.expert_ids.shape == (16, 1, tiny.MODEL.num_experts_per_tok)
        np.testing.assert_array_equal(np.sort(on_ranks[i].expert_ids), np.sort(expected.expert_ids))
    assert len(np.unique(np.concatenate([event.expert_ids for event in on_one.values()]))) > 2
    assert engines[0].status().num_accepted_tokens > 0


def check_named_kernels() -> None:
    """What is named serves on each device, here what nobody would choose."""
    engine = make_engine("grouped_tree", kernels="reference", deterministic=False)
    chunks = [tiny.chunk(tiny.prompt(i // 2, 9), index=i, sampling=COLD, max_tokens=16) for i in range(5)]
    tiny.check_against_reference(chunks, run(engine, chunks))
    assert engine._implementation == "reference" and engine.status().num_accepted_tokens > 0


def check_preemption() -> None:
    """Of the youngest of a rank whose pages run out."""
    engine = make_engine(num_pages=MESH.data * 13)  # 12 usable on a rank: two requests of 29 tokens need 16.
    chunks = [tiny.chunk(tiny.prompt(i, 9), index=i, reserve=False) for i in range(5)]
    tiny.check_against_reference(chunks, run(engine, chunks))
    assert engine.status().num_preemptions > 0


def check_moves() -> None:
    """KV goes from one rank to the other, to an engine without ranks, and back to one with."""
    engine, plain = make_engine(), make_engine(sharding=ShardingConfig(), instance_id=1)
    whole = tiny.chunk(tiny.prompt(9, 9), index=9)
    got, known, kv = [], whole.token_ids, None

    def next_chunk(handle: KVHandle | None) -> RequestChunk:
        return tiny.chunk(known, num_prompt=9, index=9, chunk_index=len(got) // 5, max_chunk=5, kv=handle)

    def take(event: ChunkFinished) -> None:
        nonlocal known, kv
        got.extend(event.token_ids.tolist())
        known, kv = np.concatenate([known, event.token_ids]), event.kv

    take(run(engine, [next_chunk(None)])[9])
    home = next(i for i, rank in enumerate(engine._planner.ranks) if rank.parked)
    # Two small requests and a large one: its rank has the small ones when it comes back.
    sizes = {0: 8, 1: 40, 2: 8} if home == 0 else {0: 40, 1: 8, 2: 8}
    others = [tiny.chunk(tiny.prompt(i, 5), index=i, num_reserved_pages=size) for i, size in sizes.items()]
    for chunk in others:
        engine.submit(chunk)
    engine.step()
    assert sum(s.rank == home for s in engine._planner.running) == SMALL.max_num_seqs // MESH.data
    results = run(engine, [next_chunk(kv)])
    take(results[9])
    tiny.check_against_reference(others, results)
    assert engine._planner.ranks[1 - home].parked and engine.status().num_imported_tokens == 9 + 5 - 1
    for source, target in ((engine, plain), (plain, engine)):
        kv = dataclasses.replace(kv, ref=source.take_kv(whole.request_id))
        take(run(target, [next_chunk(kv)])[9])
    assert got == tiny.reference_decode(whole)[0]
    assert engine.status().num_reprefilled_tokens == 0 and plain.status().num_prefilled_tokens == 0


def check_warmup() -> None:
    """It compiles all that a rollout needs, and times steps of all ranks."""
    engine = make_engine("grouped", budget="expected_gain", num_pages=MESH.data * 13)
    engine.warmup()
    times = get_step_times(engine.programs(truncates=False), None)
    assert times.plain_sizes == (SMALL.max_num_seqs,) and times.verify_sizes == (MESH.data * 2 * 5,)
    chunks = [tiny.chunk(tiny.prompt(i // 2, 9), index=i, max_chunk=6, max_tokens=12) for i in range(6)]

    def run_all() -> None:
        for event in run(engine, chunks).values():
            known = np.concatenate([chunks[event.request_id.index].token_ids, event.token_ids])
            engine.submit(
                tiny.chunk(known, num_prompt=9, index=event.request_id.index, chunk_index=1, max_tokens=12, kv=event.kv)
            )
        tiny.drain(engine)

    assert count_compilations(run_all) == 0
    assert engine.status().num_imported_tokens > 0


def roll_out(engines: list[Engine]) -> RolloutStats:
    settings = RolloutConfig(chunk_size=4, prefetch_chunks=0, starvation_interval=2)
    runner = RolloutRunner(LocalCluster(engines), RolloutDriver(make_policy("seer", settings)))
    stats = runner.run(tiny.groups(3, 4, SamplingParams(max_tokens=18, stop_token_ids=(1,), seed=5))).stats
    runner.close()
    return stats


def check_rollout() -> None:
    """Two instances whose ranks are short of pages share a pool: nothing is computed again."""
    pool = SharedPool(1 << 24)
    stats = roll_out([make_engine(instance_id=i, kv_pool=pool, num_pages=MESH.data * 13) for i in range(2)])
    plain = roll_out([make_engine(sharding=ShardingConfig())])
    assert stats.output_sha256 == plain.output_sha256
    assert stats.imported_tokens > 0 and stats.saved_bytes > 0
    assert stats.re_prefilled_tokens == stats.blocks_lost == pool.stats().num_blocks == 0


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}

if __name__ == "__main__":
    for name, check in CHECKS.items():
        try:
            check()
        except AssertionError:
            print(json.dumps({name: traceback.format_exc()}))
        else:
            print(json.dumps({name: ""}))
