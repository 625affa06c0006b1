"""Instances as Ray actors: the tokens of the in-process run, also when an instance is killed."""

import dataclasses
import pickle
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from seer_jax.config.schema import RolloutConfig, RunConfig, ShardingConfig
from seer_jax.core.commands import Command
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import CapacityError, ConfigError, InstanceLostError, ProtocolError, SeerError
from seer_jax.core.events import ChunkFinished, Event, InstanceLost, InstanceReport
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import KVHandle, RequestChunk, SamplingParams
from seer_jax.distributed import ray_cluster
from seer_jax.distributed import resources as placement
from seer_jax.distributed.instance_actor import InstanceActor
from seer_jax.distributed.ray_cluster import RayCluster, start_ray
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from tests.engine import tiny

pytestmark = pytest.mark.ray

CONFIG = RunConfig(
    engine=dataclasses.replace(tiny.CONFIG, deterministic=True),
    rollout=RolloutConfig(instances=2, chunk_size=6, prefetch_chunks=1, max_replacements=0),
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
    cluster = build_local_cluster(CONFIG, tiny.MODEL, tiny.params())
    return RolloutRunner(cluster, make_driver()).run(tiny.groups(3, 4, SAMPLING))


def test_expert_ids_come_with_the_samples_as_in_process() -> None:
    config = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, expert_ids=True))
    clusters = [start(config, tiny.MODEL, tiny.params()) for start in (RayCluster, build_local_cluster)]
    results = [RolloutRunner(cluster, make_driver()).run(tiny.groups(2, 3, SAMPLING)).samples for cluster in clusters]
    for sample, same in zip(*results, strict=True):
        assert sample.expert_ids.shape == (len(sample.token_ids), 1, 2) and sample.expert_ids.dtype == np.int16
        assert sample.expert_ids.tobytes() == same.expert_ids.tobytes()
    assert len(np.unique(results[0][0].expert_ids)) > 1
    clusters[0].close()


def wait_for_events(cluster: RayCluster) -> list[Event]:
    while not (events := cluster.wait()):
        pass
    return events


def make_driver() -> RolloutDriver:
    return RolloutDriver(make_policy("seer", CONFIG.rollout))


def test_actors_give_the_tokens_of_the_in_process_run_and_take_new_weights(expected: RolloutResult) -> None:
    generated: dict[int, int] = {}

    def note(_: float, event: Event, __: Sequence[Command]) -> None:
        if isinstance(event, InstanceReport):
            generated[event.status.instance_id] = event.status.num_generated_tokens

    cluster = RayCluster(CONFIG, tiny.MODEL, tiny.params())
    runner = RolloutRunner(cluster, make_driver(), on_event=note)
    result = runner.run(tiny.groups(3, 4, SAMPLING))
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert result.stats.re_prefilled_tokens == 0 and result.stats.num_chunks > 12
    assert sum(generated.values()) == result.stats.generated_tokens
    generated.clear()
    updated = runner.run(tiny.groups(3, 4, SAMPLING), policy_version=1, get_params=lambda: tiny.params(1))
    assert updated.stats.output_sha256 != expected.stats.output_sha256
    assert sum(generated.values()) == updated.stats.generated_tokens
    back = runner.run(tiny.groups(3, 4, SAMPLING), policy_version=2, get_params=tiny.params)
    assert back.stats.output_sha256 == expected.stats.output_sha256
    assert {sample.policy_version for sample in back.samples} == {2}
    runner.close()


def test_figures_are_those_of_the_in_process_run() -> None:
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, instances=1))
    cluster = RayCluster(config, tiny.MODEL, tiny.params())
    runner = RolloutRunner(cluster, make_driver())
    local = RolloutRunner(build_local_cluster(config, tiny.MODEL, tiny.params()), make_driver())
    for num_groups in (3, 2):  # The second run shows figures that leak out of the first.
        stats, expected = (r.run(tiny.groups(num_groups, 4, SAMPLING)).stats for r in (runner, local))
        # How many prompts are copied from a sibling depends on when the chunks arrive.
        for field in ("output_sha256", "generated_tokens", "num_preemptions", "num_chunks"):
            assert getattr(stats, field) == getattr(expected, field), field
        assert stats.prefilled_tokens > 0
    runner.close()


def test_instance_killed_between_two_runs_loses_no_token(expected: RolloutResult) -> None:
    cluster = RayCluster(CONFIG, tiny.MODEL, tiny.params())
    runner = RolloutRunner(cluster, make_driver())
    runner.run(tiny.groups(3, 4, SAMPLING))
    cluster.kill(0)
    result = runner.run(tiny.groups(3, 4, SAMPLING), policy_version=1, get_params=tiny.params)
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert [info.instance_id for info in cluster.infos] == [1]
    cluster.kill(1)
    cluster.start_iteration(2, None)
    assert wait_for_events(cluster) == [InstanceLost(instance_id=1)]
    with pytest.raises(InstanceLostError, match="all instances are lost"):
        cluster.wait()
    runner.close()


def test_engine_that_cannot_be_built_is_our_error_and_leaves_no_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(RayCluster, "close", lambda self, close=RayCluster.close: closed.append(close(self)))
    config = dataclasses.replace(CONFIG, sharding=ShardingConfig(tensor=3))
    with pytest.raises(ConfigError, match=r"sharding\.tensor") as info:
        RayCluster(config, tiny.MODEL, tiny.params())
    assert type(info.value) is ConfigError and info.value.path == "sharding.tensor"
    assert len(closed) == 1


@pytest.mark.parametrize("error", [ConfigError("a.b", "wrong", "fix it"), CapacityError("a request", 5, 3, "pages")])
def test_errors_keep_their_fields_between_processes(error: SeerError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_instance_that_no_node_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"GPU": 4.0}}] * 2 + [{"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def check(instances: int, tensor: int) -> None:
        placement.check_resources(
            "gpu", RunConfig(rollout=RolloutConfig(instances=instances), sharding=ShardingConfig(tensor=tensor))
        )

    check(4, 2)
    check(2, 3)
    with pytest.raises(ConfigError, match=r"rollout\.instances: 3 instances of 3 GPUs"):
        check(3, 3)
    with pytest.raises(ConfigError, match="sharding: 1 instances of 8 GPUs"):
        check(1, 8)


@pytest.mark.parametrize(
    ("resources", "installed", "jax_platforms", "platform"),
    [
        ({"GPU": 1.0}, {"jax_cuda12_plugin"}, "", "gpu"),
        ({"GPU": 1.0}, {"libtpu"}, "", "cpu"),
        ({"GPU": 1.0}, {"jax_cuda13_plugin"}, "cpu", "cpu"),
        ({"TPU": 4.0}, {"libtpu"}, "", "tpu"),
        ({"CPU": 8.0}, {"libtpu", "jax_cuda13_plugin"}, "", "cpu"),
    ],
)
def test_accelerator_counts_only_if_ray_reports_it_and_jax_can_use_it(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], installed: set[str], jax_platforms: str, platform: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(placement, "find_spec", lambda name: SimpleNamespace() if name in installed else None)
    monkeypatch.setenv("JAX_PLATFORMS", jax_platforms)
    assert placement.find_platform() == platform


class KillingCluster(RayCluster):
    """Kills an instance's process after it got its third batch of chunks."""

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """Send, then kill."""
        super().send(chunks)
        self.num_sends = getattr(self, "num_sends", 0) + (0 in chunks)
        if self.num_sends == 3 and 0 in self._instances:
            self.kill(0)


def test_killed_instance_loses_no_token(expected: RolloutResult) -> None:
    cluster = KillingCluster(CONFIG, tiny.MODEL, tiny.params())
    result = RolloutRunner(cluster, make_driver()).run(tiny.groups(3, 4, SAMPLING))
    assert [info.instance_id for info in cluster.infos] == [1]
    assert result.stats.output_sha256 == expected.stats.output_sha256
    cluster.close()


def test_loss_of_the_last_instance_is_an_error_not_a_hang() -> None:
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, instances=1))
    cluster = KillingCluster(config, tiny.MODEL, tiny.params())
    with pytest.raises(InstanceLostError):
        RolloutRunner(cluster, make_driver()).run(tiny.groups(3, 4, SAMPLING))
    cluster.close()


def test_error_inside_the_engine_thread_reaches_the_caller() -> None:
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, instances=1))
    cluster = RayCluster(config, tiny.MODEL, tiny.params())
    cluster.send({0: [tiny.chunk(tiny.prompt(0, 4), policy_version=9)]})
    with pytest.raises(ProtocolError, match="policy version 9"):
        while True:
            cluster.wait()
    cluster.close()


def test_kv_of_a_dead_or_unknown_instance_costs_a_prefill() -> None:
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, instances=2))
    cluster = RayCluster(config, tiny.MODEL, tiny.params())
    cluster.kill(0)
    whole = [tiny.chunk(tiny.prompt(i, 9), index=i) for i in range(2)]
    tokens = [tiny.reference_decode(chunk)[0] for chunk in whole]
    for i, owner in enumerate((0, 7)):
        known = np.concatenate([whole[i].token_ids, np.array(tokens[i][:6], np.int32)])
        kv = KVHandle(num_tokens=14, policy_version=0, ref=owner)
        cluster.send({1: [tiny.chunk(known, num_prompt=9, index=i, chunk_index=1, kv=kv)]})
    finished, prefilled = {}, 0
    while len(finished) < 2:
        for event in cluster.wait():
            if isinstance(event, ChunkFinished):
                finished[event.request_id.index] = event.token_ids.tolist()
            elif isinstance(event, InstanceReport):
                prefilled = event.status.num_reprefilled_tokens
    assert finished == {i: tokens[i][6:] for i in range(2)} and prefilled == 2 * 14
    cluster.close()


class BrokenTransfer(InstanceActor):
    """An instance whose KV fetches fail in a way that nobody foresaw."""

    def _fetch(self, chunk: RequestChunk) -> None:
        raise ZeroDivisionError(str(chunk.request_id))


def test_unexpected_error_of_a_transfer_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "InstanceActor", BrokenTransfer)
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, instances=1))
    cluster = RayCluster(config, tiny.MODEL, tiny.params())
    kv = KVHandle(num_tokens=3, policy_version=0, ref=ray.put(None))
    cluster.send({0: [tiny.chunk(tiny.prompt(0, 4), kv=kv)]})
    with pytest.raises(ZeroDivisionError):
        while True:
            cluster.wait()
    cluster.close()
