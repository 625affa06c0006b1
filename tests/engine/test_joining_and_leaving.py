"""Instances that come and go between the chunks of a rollout, as preemptible machines do: the same tokens."""

import dataclasses
from collections.abc import Sequence

import pytest

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import ChunkFinished, Event, InstanceJoined, InstanceLost
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from tests.engine import tiny
from tests.engine.test_paused_kv import SharedPool

SAMPLING = SamplingParams(max_tokens=40, stop_token_ids=(1, 2), seed=5)
MIDDLE = 20
"""Chunks finished when something happens, of some 45."""


def make_engine(instance_id: int, num_slots: int = 4, pool: SharedPool | None = None) -> Engine:
    config = dataclasses.replace(tiny.CONFIG, deterministic=True, max_num_seqs=num_slots)
    return Engine(tiny.MODEL, tiny.params(), config, instance_id=instance_id, kv_pool=pool)


class ElasticCluster(LocalCluster):
    """When `MIDDLE` chunks are finished an instance joins, or one leaves as soon as it has paused requests only."""

    def __init__(self, engines: Sequence[Engine], *, joins: Engine | None = None, leaves: int | None = None) -> None:
        super().__init__(engines)
        self._joins, self._leaves, self._num_finished = joins, leaves, 0

    def wait(self) -> list[Event]:
        """See `LocalCluster`."""
        events = super().wait()
        self._num_finished += sum(isinstance(event, ChunkFinished) for event in events)
        if self._num_finished < MIDDLE:
            return events
        if self._joins is not None:
            engine, self._joins = self._joins, None
            self._engines[engine.info.instance_id] = engine
            self._places[engine.info.instance_id] = len(self._places)
            events.append(InstanceJoined(info=engine.info, policy_version=engine.policy_version))
        leaving = self._engines.get(self._leaves)
        if leaving is not None and not leaving.has_work and leaving._planner.parked:
            del self._engines[self._leaves]
            leaving.close()
            events.append(InstanceLost(instance_id=self._leaves))
        return events


def roll_out(cluster: LocalCluster) -> tuple[RolloutResult, list[Event]]:
    log: list[Event] = []
    settings = RolloutConfig(chunk_size=8, prefetch_chunks=0, starvation_interval=2)
    runner = RolloutRunner(
        cluster, RolloutDriver(make_policy("seer", settings)), on_event=lambda _, event, __: log.append(event)
    )
    result = runner.run(tiny.groups(3, 4, SAMPLING))
    runner.close()
    return result, log


@pytest.fixture(scope="module")
def expected() -> str:
    return roll_out(LocalCluster([make_engine(0)]))[0].stats.output_sha256


def finished(log: Sequence[Event], instance_id: int) -> list[int]:
    """Places in the log of the chunks that ended at an instance."""
    return [i for i, event in enumerate(log) if isinstance(event, ChunkFinished) and event.instance_id == instance_id]


def test_an_instance_that_joins_in_the_middle_takes_chunks_and_the_kv_that_they_have(expected):
    result, log = roll_out(ElasticCluster([make_engine(0)], joins=make_engine(1)))
    assert result.stats.output_sha256 == expected and result.stats.instances_lost == 0
    (moment,) = [i for i, e in enumerate(log) if isinstance(e, InstanceJoined) and e.info.instance_id == 1]
    before, after = (finished(log[part], 0) for part in (slice(moment), slice(moment, None)))
    assert len(before) >= MIDDLE and len(after) > 3 and len(finished(log, 1)) > 3
    resumed = {log[i].request_id for i in finished(log, 1)} & {log[i].request_id for i in before}
    assert resumed, "requests go on where they had not begun"
    assert result.stats.imported_tokens > 0 and result.stats.re_prefilled_tokens == 0


@pytest.mark.parametrize("shares_kv", [False, True])
def test_an_instance_that_leaves_between_chunks_costs_no_token(shares_kv, expected, monkeypatch):
    """Nor is anything computed again, but for the KV of paused requests, and that only without a shared pool."""
    monkeypatch.setattr("seer_jax.engine.paused_kv.MAX_SAVES", 1000)  # No save is skipped for want of time.
    pool = SharedPool(1 << 24) if shares_kv else None
    cluster = ElasticCluster([make_engine(0, pool=pool), make_engine(1, num_slots=1, pool=pool)], leaves=1)
    result, log = roll_out(cluster)
    assert result.stats.output_sha256 == expected
    assert result.stats.instances_lost == 1
    (moment,) = [i for i, event in enumerate(log) if isinstance(event, InstanceLost)]
    assert finished(log[:moment], 1) and not finished(log[moment:], 1) and len(finished(log[moment:], 0)) > 3
    assert (result.stats.re_prefilled_tokens == 0) == shares_kv
