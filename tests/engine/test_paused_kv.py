"""KV that others need the pages of goes through the pool: small, damaged or full, it never costs a token."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from seer_jax.config.schema import ChaosConfig, KVPoolConfig, RolloutConfig, RunConfig
from seer_jax.config.validate import validate
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.move_cost import MoveCosts
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import RolloutGroup, SamplingParams
from seer_jax.engine import paused_kv
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.factory import build_engine
from seer_jax.engine.kv_blocks import BLOCK_TOKENS
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from seer_jax.kvpool import BlockKey, EmbeddedKVPool, Status
from tests.engine import tiny

SAMPLING = SamplingParams(max_tokens=40, stop_token_ids=(1, 2), seed=5)
TOKEN_BYTES = 2 * 24 * 4
BLOCK_BYTES = 20 * 4 * TOKEN_BYTES
"""KV of a long request: pages x page_size x layers x latent width x float32."""


def roll_out(
    pools: list[EmbeddedKVPool | None],
    chaos: ChaosConfig | None = None,
    *,
    num_pages: int = 22,
    sampling: SamplingParams = SAMPLING,
    prompts: Sequence[RolloutGroup] = (),
) -> RolloutResult:
    """Three groups of four on one instance per pool; few pages and short chunks, so that paused KV must go."""
    config = dataclasses.replace(tiny.CONFIG, deterministic=True, num_pages=num_pages)
    engines = [
        Engine(tiny.MODEL, tiny.params(), config, instance_id=i, kv_pool=pool, chaos=chaos or ChaosConfig())
        for i, pool in enumerate(pools)
    ]
    cluster = LocalCluster(engines)
    settings = RolloutConfig(chunk_size=4, prefetch_chunks=0, starvation_interval=2)
    runner = RolloutRunner(cluster, RolloutDriver(make_policy("seer", settings)))
    result = runner.run(prompts or tiny.groups(3, 4, sampling))
    runner.close()
    return result


@pytest.fixture(scope="module")
def expected() -> RolloutResult:
    return roll_out([None], num_pages=128)


def check(result: RolloutResult, expected: RolloutResult) -> None:
    assert result.stats.output_sha256 == expected.stats.output_sha256
    for sample, same in zip(result.samples, expected.samples, strict=True):
        assert sample.logprobs.tobytes() == same.logprobs.tobytes()


@pytest.mark.parametrize("instances", [1, 2])
def test_nothing_is_computed_again_while_the_pool_has_room(instances, expected):
    assert expected.stats.imported_tokens == 0
    result = roll_out([None] * instances)
    check(result, expected)
    assert result.stats.imported_tokens > 0
    assert result.stats.re_prefilled_tokens == result.stats.blocks_lost == result.stats.spilled_bytes == 0


def test_a_pool_with_little_memory_spills_to_disk(tmp_path, expected):
    pool = EmbeddedKVPool(2 * BLOCK_BYTES, directory=tmp_path, max_disk_bytes=1 << 20)
    result = roll_out([pool])
    check(result, expected)
    assert result.stats.spilled_bytes > 0 and result.stats.imported_tokens > 0
    assert result.stats.re_prefilled_tokens == result.stats.blocks_lost == 0


def test_damaged_blocks_are_noticed_and_computed_again(expected):
    result = roll_out([None, None], ChaosConfig(corrupt_block=3))
    check(result, expected)
    assert result.stats.blocks_corrupt == 6 and result.stats.re_prefilled_tokens > 0


def test_a_full_disk_costs_blocks_and_no_token(tmp_path, expected):
    pool = EmbeddedKVPool(BLOCK_BYTES, directory=tmp_path, max_disk_bytes=1 << 20)
    pool.fill_disk()
    result = roll_out([pool])
    check(result, expected)
    assert result.stats.blocks_lost > 0 and result.stats.re_prefilled_tokens > 0 and result.stats.spilled_bytes == 0


def test_a_pool_without_room_is_no_pool(expected):
    result = roll_out([EmbeddedKVPool(0)])
    check(result, expected)
    assert result.stats.imported_tokens == 0 and result.stats.re_prefilled_tokens > 0


def test_siblings_that_said_the_same_keep_a_block_each():
    greedy = dataclasses.replace(SAMPLING, temperature=0.0, stop_token_ids=())
    result = roll_out([None], sampling=greedy)
    said = {sample.request_id.group_id: sample.token_ids.tobytes() for sample in result.samples}
    assert all(said[s.request_id.group_id] == s.token_ids.tobytes() for s in result.samples)
    assert result.stats.imported_tokens > 0 and result.stats.re_prefilled_tokens == 0


class SharedPool(EmbeddedKVPool):
    """One that several engines use and that outlives them."""

    is_shared = True

    def close(self) -> None:
        """Leave it to the others."""


def test_a_shared_pool_gets_every_token_once_and_keeps_nothing_that_ended(expected):
    pool = SharedPool(1 << 24)
    result = roll_out([pool, pool])
    check(result, expected)
    stats, figures = pool.stats(), result.stats
    assert figures.re_prefilled_tokens == figures.blocks_lost == 0
    # A whole KV per chunk of 4 tokens would be several times as much; the last block of each is sent again.
    tokens = sum(len(s.prompt_token_ids) + len(s.token_ids) for s in result.samples)
    whole = sum(
        sum(range(len(s.prompt_token_ids), len(s.prompt_token_ids) + len(s.token_ids), 4)) for s in result.samples
    )
    assert 0 < figures.saved_bytes < TOKEN_BYTES * (tokens + 32 * figures.num_chunks) and whole > 2 * tokens
    assert stats.num_stored > 0 and stats.num_blocks == 0


class NotedPool(EmbeddedKVPool):
    """Notes how many blocks each call asks for."""

    def __init__(self, max_dram_bytes: int) -> None:
        super().__init__(max_dram_bytes)
        self.asked: list[int] = []

    def get_blocks(self, keys: Sequence[BlockKey], outs: Sequence[np.ndarray]) -> list[Status]:
        """See `KVPool`."""
        self.asked.append(len(keys))
        return super().get_blocks(keys, outs)


class NotedSharedPool(NotedPool, SharedPool):
    """The same for several engines."""


@pytest.mark.parametrize(("num_slots", "asked"), [(2, [1]), (1, [1, 3])])
def test_only_what_siblings_do_not_have_is_weighed_and_brought(num_slots, asked, monkeypatch):
    """Two blocks of the prompt are here while a sibling runs; one that is gone at admission is brought after all."""
    weighed = []
    monkeypatch.setattr(MoveCosts, "moving_pays", lambda _, *sizes, **__: weighed.append(sizes) or True)
    pool = NotedSharedPool(1 << 24)
    here = go_on_beside_a_sibling(pool, num_slots)
    assert here.status().num_prefilled_tokens <= 70 and here.status().num_reprefilled_tokens == 0
    page_bytes = 4 * TOKEN_BYTES
    assert pool.asked == asked and weighed == [(75 - 68, 3 * page_bytes), (75, 19 * page_bytes)][: len(asked)]
    here.close()


def test_a_move_that_is_declined_at_arrival_and_again_at_admission_counts_once():
    pool = NotedSharedPool(1 << 24)
    here = go_on_beside_a_sibling(pool, 1, move_s=1e6)
    assert here.status().num_declined_moves == here._paused_kv.costs._num_in_a_row == 1 and not pool.asked
    here.close()


def go_on_beside_a_sibling(pool: NotedSharedPool, num_slots: int, move_s: float | None = None) -> Engine:
    """An instance that ran the second chunk of a request; it came from another one while a sibling had a slot.

    If `move_s` is given, that is what moves took there, and a prefill step a millisecond.
    """
    config = dataclasses.replace(tiny.CONFIG, deterministic=True, max_num_seqs=num_slots)
    there, here = (
        Engine(tiny.MODEL, tiny.params(), config, instance_id=i, kv_pool=pool, always_moves_kv=move_s is None)
        for i in range(2)
    )
    if move_s is not None:
        here._paused_kv.costs.move.note(1, move_s)
        here._paused_kv.costs.prefill.note(1, 1e-3)
    sibling, mine = (tiny.chunk(tiny.prompt(0, 70), index=i, max_chunk=size) for i, size in enumerate((20, 6)))
    there.submit(mine)
    paused = tiny.drain(there)[1]
    here.submit(sibling)
    while not here.status().num_generated_tokens:
        here.step()
    known = np.concatenate([mine.token_ids, paused.token_ids])
    kv = dataclasses.replace(paused.kv, ref=None)
    here.submit(tiny.chunk(known, num_prompt=70, index=1, chunk_index=1, max_chunk=6, kv=kv))
    second = tiny.drain(here)[1]
    whole = tiny.reference_decode(dataclasses.replace(mine, max_chunk_tokens=12))[0]
    assert [*paused.token_ids, *second.token_ids] == whole
    there.close()
    return here


def test_prompts_longer_than_a_block_stay_with_their_siblings():
    """Whoever comes, goes or is given away meanwhile: the same tokens, and nothing is computed again."""
    sampling = dataclasses.replace(SAMPLING, max_tokens=24, stop_token_ids=())
    groups = [
        dataclasses.replace(group, prompt_token_ids=tiny.prompt(group.group_id, 45 + 5 * group.group_id))
        for group in tiny.groups(3, 4, sampling)
    ]
    pool = NotedPool(1 << 24)
    result = roll_out([pool], prompts=groups, num_pages=44)
    check(result, roll_out([None], prompts=groups, num_pages=400))
    assert result.stats.re_prefilled_tokens == 0 and result.stats.imported_tokens > 0
    assert pool.asked.count(1), "some find the first block of their prompt here"


@pytest.fixture
def no_save_is_skipped(monkeypatch):
    """A shared pool is skipped while it is busy, and how busy it is depends on the machine."""
    monkeypatch.setattr(paused_kv, "MAX_SAVES", 1000)


def kill_one(pools: list[EmbeddedKVPool], between: Callable[[], None] | None = None) -> RolloutResult:
    """Two instances, one of which dies when some of the requests are finished."""
    config = dataclasses.replace(tiny.CONFIG, deterministic=True, num_pages=64)
    engines = [Engine(tiny.MODEL, tiny.params(), config, instance_id=i, kv_pool=pool) for i, pool in enumerate(pools)]
    chaos = ChaosConfig(kill_instance=1, seed=7)
    settings = RolloutConfig(chunk_size=4, prefetch_chunks=0, starvation_interval=2)
    cluster = LocalCluster(engines)
    if between is not None:
        kill = cluster.kill
        cluster.kill = lambda instance_id: (kill(instance_id), between())
    runner = RolloutRunner(cluster, RolloutDriver(make_policy("seer", settings)), chaos=chaos)
    result = runner.run(tiny.groups(3, 4, SAMPLING))
    runner.close()  # What is still on its way to the pool, or to be dropped there, gets there.
    return result


@pytest.mark.usefixtures("no_save_is_skipped")
def test_kv_in_a_shared_pool_outlives_its_instance(expected):
    alone = kill_one([EmbeddedKVPool(1 << 24), EmbeddedKVPool(1 << 24)])
    pool = SharedPool(1 << 24)
    shared = kill_one([pool, pool])
    for result in (alone, shared):
        check(result, expected)
        assert result.stats.instances_lost == 1 and result.stats.chunks_resumed > 0
    assert alone.stats.re_prefilled_tokens > 20
    assert shared.stats.re_prefilled_tokens < alone.stats.re_prefilled_tokens / 4
    assert pool.stats().num_blocks == 0


def test_a_shared_pool_that_loses_everything_gets_it_again(expected):
    pool = SharedPool(1 << 24)
    result = kill_one([pool, pool], between=lambda: pool.drop(pool.keys()))
    check(result, expected)
    assert result.stats.re_prefilled_tokens > 0 and pool.stats().num_blocks == 0


@pytest.mark.usefixtures("no_save_is_skipped")
def test_of_a_request_whose_last_blocks_are_gone_the_first_ones_are_used(expected):
    pool = SharedPool(1 << 24)

    def lose_partial_blocks() -> None:
        pool.drop(list(filter(lambda key: key.num_tokens < BLOCK_TOKENS, pool.keys())))

    whole = kill_one([pool, pool], between=lambda: pool.drop(pool.keys()))
    result = kill_one([pool, pool], between=lose_partial_blocks)
    check(result, expected)
    assert 0 < result.stats.re_prefilled_tokens < whole.stats.re_prefilled_tokens


def run_config(tmp_path: Path, **chaos: bool) -> RunConfig:
    return RunConfig(
        engine=dataclasses.replace(tiny.CONFIG, num_pages=32),
        kvpool=KVPoolConfig(dram_mib=1, disk_mib=4, directory=str(tmp_path)),
        chaos=ChaosConfig(**chaos),
    )


def test_each_place_has_a_directory_which_a_replacement_takes_over(tmp_path):
    first = build_engine(run_config(tmp_path), tiny.MODEL, tiny.params(), instance_id=0, place=1)
    assert [path.name for path in tmp_path.iterdir()] == ["instance-1"]
    with pytest.raises(ConfigError, match="directory"):
        build_engine(run_config(tmp_path), tiny.MODEL, tiny.params(), instance_id=2, place=1)
    first.close()
    build_engine(run_config(tmp_path), tiny.MODEL, tiny.params(), instance_id=2, place=1).close()


@pytest.mark.parametrize(
    ("kvpool", "chaos", "field"),
    [
        ({"disk_mib": 8}, {}, r"kvpool\.directory"),
        ({"dram_mib": -1}, {}, r"kvpool\.dram_mib"),
        ({"backend": "ray"}, {}, r"kvpool\.backend"),
        ({"mooncake_master": "localhost"}, {}, r"kvpool\.mooncake_master.*host:port"),
        ({"mooncake_master": "localhost:65536"}, {}, r"kvpool\.mooncake_master.*host:port"),
        ({"mooncake_segment_mib": 15}, {}, r"kvpool\.mooncake_segment_mib.*16"),
        ({"mooncake_buffer_mib": 0}, {}, r"kvpool\.mooncake_buffer_mib"),
        ({"mooncake_timeout_s": 0.0}, {}, r"kvpool\.mooncake_timeout_s"),
        ({"backend": "mooncake", "disk_mib": 8, "directory": "x"}, {}, r"kvpool\.disk_mib"),
        ({}, {"fill_disk": True}, r"chaos\.fill_disk"),
        ({}, {"corrupt_block": -2}, r"chaos\.corrupt_block"),
    ],
)
def test_settings_that_cannot_be_are_refused(kvpool, chaos, field):
    with pytest.raises(ConfigError, match=field):
        validate(
            RunConfig(
                rollout=RolloutConfig(runtime="local"), kvpool=KVPoolConfig(**kvpool), chaos=ChaosConfig(**chaos)
            ),
            training=False,
        )
