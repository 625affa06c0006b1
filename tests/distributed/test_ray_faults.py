"""Actors that die, hang, lose their device or their messages: replaced, and the same tokens."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import pytest
import ray

from seer_jax.config.schema import ChaosConfig, KVPoolConfig, RolloutConfig, RunConfig
from seer_jax.core.commands import Command
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import InstanceLostError
from seer_jax.core.events import ChunkFinished, Event, InstanceJoined, InstanceLost
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.distributed import ray_cluster
from seer_jax.distributed.instance_actor import InstanceActor
from seer_jax.distributed.ray_cluster import RayCluster, start_ray
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from tests.engine import tiny

pytestmark = pytest.mark.ray

CONFIG = RunConfig(
    engine=dataclasses.replace(tiny.CONFIG, deterministic=True, compilation_cache_dir="~/.cache/seer_jax/xla"),
    rollout=RolloutConfig(instances=2, chunk_size=6, prefetch_chunks=1),
)
SAMPLING = SamplingParams(max_tokens=48, seed=5)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected() -> RolloutResult:
    """The in-process run."""
    return roll_out(build_local_cluster(CONFIG, tiny.MODEL, tiny.params()))[0]


def roll_out(cluster, chaos: ChaosConfig | None = None) -> tuple[RolloutResult, list[Event]]:
    log: list[Event] = []

    def note(_: float, event: Event, __: Sequence[Command]) -> None:
        log.append(event)

    driver = RolloutDriver(make_policy("seer", CONFIG.rollout))
    runner = RolloutRunner(cluster, driver, on_event=note, chaos=chaos or ChaosConfig())
    return runner.run(tiny.groups(3, 4, SAMPLING)), log


def start(chaos: ChaosConfig | None = None, **rollout: float) -> RayCluster:
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, **rollout))
    return RayCluster(dataclasses.replace(config, chaos=chaos or ChaosConfig()), tiny.MODEL, tiny.params())


def joined(log: list[Event]) -> list[int]:
    return [event.info.instance_id for event in log if isinstance(event, InstanceJoined)]


def test_the_only_instance_is_killed_and_another_takes_over_also_with_new_weights(expected):
    chaos = ChaosConfig(kill_instance=1)
    cluster = start(instances=1, max_replacements=1)  # In each rollout.
    result, log = roll_out(cluster, chaos)
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert result.stats.instances_lost == 1 and result.stats.chunks_resumed > 0
    assert joined(log) == [0, 1] and [info.instance_id for info in cluster.infos] == [1]
    assert any(isinstance(event, ChunkFinished) and event.instance_id == 1 for event in log)
    cluster.start_iteration(3, tiny.params(1))
    cluster.kill(1)
    events: list[Event] = []
    while len(events) < 2:
        events += cluster.wait()
    assert events == [InstanceLost(instance_id=1), events[1]] and events[1].policy_version == 3
    cluster.send({2: [tiny.chunk(tiny.prompt(0, 4), policy_version=3)]})
    finished = [event for event in iter_events(cluster) if isinstance(event, ChunkFinished)]
    assert finished[0].token_ids.tolist() == tiny.reference_decode(tiny.chunk(tiny.prompt(0, 4)), seed=1)[0]
    cluster.close()


def test_chunks_of_the_dead_go_on_at_the_living(expected):
    chaos = ChaosConfig(kill_instance=2, seed=1)
    cluster = start(max_replacements=1)
    result, _ = roll_out(cluster, chaos)
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert result.stats.instances_lost == 2 and result.stats.chunks_resumed > 0
    assert len(cluster.infos) + cluster.expects_instances == 1
    cluster.close()


def iter_events(cluster: RayCluster) -> Iterator[Event]:
    """Events until a chunk has finished."""
    while True:
        for event in cluster.wait():
            yield event
            if isinstance(event, ChunkFinished):
                return


def test_lost_messages_are_sent_again(expected):
    cluster = start(ChaosConfig(drop_message=0.2), instances=1)
    result, log = roll_out(cluster)
    assert result.stats.output_sha256 == expected.stats.output_sha256 and result.stats.instances_lost == 0
    assert joined(log) == [0] and expected.stats.messages_dropped == 0
    assert result.stats.messages_dropped == cluster.num_dropped_messages > 5
    cluster.start_iteration(0, None)
    assert cluster.num_dropped_messages == 0
    cluster.close()


class FailingActor(InstanceActor):
    """The first instance fails at its fifth step, in a way that a subclass says."""

    def start(self, instance_id, *args):
        """Start, and count steps from now on."""
        info = super().start(instance_id, *args)
        step, left = self._engine.step, [5]

        def step_or_fail():
            left[0] -= 1
            if left[0] == 0 and instance_id == 0:
                self.fail()
            return step()

        self._engine.step = step_or_fail
        return info


class NoReplacement(InstanceActor):
    """Only the first instance can be built."""

    def start(self, instance_id, *args):
        """Fail in a way that only the process itself knows."""
        if instance_id:
            raise RuntimeError("Unable to initialize backend")
        return super().start(instance_id, *args)


def test_replacements_that_cannot_start_are_tried_so_often_and_the_cause_is_told(monkeypatch):
    monkeypatch.setattr(ray_cluster, "InstanceActor", NoReplacement)
    cluster = start(instances=1, max_replacements=2)
    with pytest.raises(InstanceLostError, match="Unable to initialize backend"):
        roll_out(cluster, ChaosConfig(kill_instance=1))
    assert not cluster.infos and not cluster.expects_instances
    cluster.close()


class HangingActor(FailingActor):
    """Its fifth step does not end."""

    def fail(self):
        """Hang."""
        time.sleep(10_000)


class BrokenDevice(FailingActor):
    """Its device fails."""

    def fail(self):
        """As XLA reports it."""
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")


@pytest.mark.parametrize("actor", [HangingActor, BrokenDevice])
def test_an_instance_that_hangs_or_whose_device_fails_is_replaced(actor, expected, monkeypatch):
    monkeypatch.setattr(ray_cluster, "InstanceActor", actor)
    cluster = start(instances=1, instance_timeout_s=15.0 if actor is HangingActor else 1000.0)
    result, log = roll_out(cluster)
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert [event.instance_id for event in log if isinstance(event, InstanceLost)] == [0]
    assert result.stats.chunks_resumed > 0
    cluster.close()


class SlowActor(InstanceActor):
    """Its steps take as long as those of a real model, next to which calls to the pool are short."""

    def start(self, *args):
        """Start, and wait in every step from now on."""
        info = super().start(*args)
        step = self._engine.step

        def wait_and_step():
            time.sleep(0.05)
            return step()

        self._engine.step = wait_and_step
        return info


def test_kv_in_the_shared_pool_outlives_its_instance_and_an_owner_that_dies_costs_no_token(expected, monkeypatch):
    monkeypatch.setattr(ray_cluster, "InstanceActor", SlowActor)
    figures = []
    for backend, num_owners in (("embedded", 0), ("ray", 0), ("ray", 2)):
        chaos = ChaosConfig(kill_instance=1, kill_pool_owner=num_owners, seed=7)
        config = dataclasses.replace(CONFIG, chaos=chaos, kvpool=KVPoolConfig(backend=backend, move="always"))
        cluster = RayCluster(config, tiny.MODEL, tiny.params())
        result, _ = roll_out(cluster, chaos)
        cluster.close()
        assert result.stats.output_sha256 == expected.stats.output_sha256
        assert result.stats.instances_lost == 1 and result.stats.pool_owners_lost == num_owners
        figures.append(result.stats)
    embedded, shared, _ = figures
    assert embedded.re_prefilled_tokens > 50
    assert shared.re_prefilled_tokens < embedded.re_prefilled_tokens / 2
