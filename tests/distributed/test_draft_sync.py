"""The draft server in Ray: instances draft from each other's requests; its death costs acceptance only."""

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from seer_jax.config.schema import RolloutConfig, RunConfig, SpeculationConfig
from seer_jax.core.commands import Command, EmitSample
from seer_jax.core.draft.client import DraftClient
from seer_jax.core.draft.messages import ExchangeReply
from seer_jax.core.draft.speculate import SpeculationArgs
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import Event
from seer_jax.core.scheduling import make_policy
from seer_jax.core.sequence import Sequence as RunningSequence
from seer_jax.core.types import InstanceInfo, SamplingParams
from seer_jax.distributed import ray_cluster
from seer_jax.distributed.draft_sync import DraftSync
from seer_jax.distributed.instance_actor import InstanceActor
from seer_jax.distributed.ray_cluster import RayCluster, start_ray
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutRunner
from tests.engine import tiny

pytestmark = pytest.mark.ray

CONFIG = RunConfig(
    engine=dataclasses.replace(tiny.CONFIG, deterministic=True, max_steps_per_dispatch=4),
    rollout=RolloutConfig(instances=2, chunk_size=6, prefetch_chunks=1),
    speculation=SpeculationConfig(
        mode="grouped", budget="fixed", min_probability=0.0, sync_interval_s=0.01, draft_servers=2
    ),
)
SAMPLING = SamplingParams(max_tokens=64, temperature=0.3)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


def make_driver() -> RolloutDriver:
    return RolloutDriver(make_policy("seer", CONFIG.rollout))


def num_known(cluster: RayCluster) -> list[int]:
    """Tokens that each server holds."""
    return ray.get([actor.num_tokens.remote() for actor in cluster._draft_servers.actors])


def test_servers_hear_all_groups_and_their_death_costs_no_token() -> None:
    groups = tiny.groups(4, 6, SAMPLING)
    off = dataclasses.replace(CONFIG, speculation=SpeculationConfig())
    plain = RolloutRunner(build_local_cluster(off, tiny.MODEL, tiny.params()), make_driver()).run(groups).stats
    cluster = RayCluster(CONFIG, tiny.MODEL, tiny.params())
    victims: list[object] = []

    def kill_a_server(_: float, __: Event, commands: Sequence[Command]) -> None:
        if victims and any(isinstance(command, EmitSample) for command in commands):
            ray.kill(victims.pop())

    runner = RolloutRunner(cluster, make_driver(), on_event=kill_a_server)
    whole = runner.run(groups).stats
    assert whole.output_sha256 == plain.output_sha256 and whole.accepted_tokens > 0
    assert all(count > 0 for count in num_known(cluster))

    victims.append(cluster._draft_servers.actors[0])
    broken = runner.run(groups).stats
    assert not victims
    assert broken.output_sha256 == plain.output_sha256 and broken.accepted_tokens > 0

    healed = runner.run(groups, policy_version=1, get_params=tiny.params).stats
    assert healed.output_sha256 == plain.output_sha256 and healed.accepted_tokens > 0
    assert all(count > 0 for count in num_known(cluster))
    runner.close()


class BrokenClient(InstanceActor):
    """An instance whose draft client fails to take in what siblings said elsewhere, half way."""

    def start(self, *args: Any) -> InstanceInfo:
        """Start, then break the client."""
        info = super().start(*args)
        client = self._engine.speculator.client

        def fail(reply: ExchangeReply) -> None:
            DraftClient.apply(client, reply)
            raise ZeroDivisionError

        client.apply = fail
        return info

    def num_dropped(self) -> int:
        """Replies that were dropped."""
        return self._draft_sync.num_dropped


def test_a_client_that_fails_costs_no_token_and_ends_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tiny.groups(4, 6, SAMPLING)
    off = dataclasses.replace(CONFIG, speculation=SpeculationConfig())
    plain = RolloutRunner(build_local_cluster(off, tiny.MODEL, tiny.params()), make_driver()).run(groups).stats
    monkeypatch.setattr(ray_cluster, "InstanceActor", BrokenClient)
    cluster = RayCluster(CONFIG, tiny.MODEL, tiny.params())
    runner = RolloutRunner(cluster, make_driver())
    for version in range(2):  # The servers that were given up are asked again.
        stats = runner.run(groups, policy_version=version, get_params=tiny.params).stats
        assert stats.output_sha256 == plain.output_sha256 and stats.accepted_tokens > 0
        dropped = ray.get([each.actor.num_dropped.remote() for each in cluster._instances.values()])
        assert all(version < count <= 2 * (version + 1) for count in dropped)
    runner.close()


def test_a_dropped_reply_is_forgotten_as_a_whole_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    client = DraftClient(SpeculationArgs(), grouped=True, ttl_seconds=60.0)
    calls: list[ExchangeReply] = []

    def fail(reply: ExchangeReply) -> None:
        calls.append(reply)
        raise ZeroDivisionError

    client.apply = fail
    server = SimpleNamespace(
        exchange=SimpleNamespace(remote=lambda *_: ray.put(ExchangeReply(epoch=0, num_held={}, deltas=[])))
    )
    sync = DraftSync(client, 1.0, lambda call: call(), lambda: True)
    sequence = RunningSequence(tiny.chunk(tiny.prompt(0, 9)), 0)
    for count in (1, 2):
        sync.connect([server])
        client.observe(sequence)
        assert client.held()
        sync.exchange()
        sync.exchange()  # The server is given up until the next `connect`.
        assert len(calls) == sync.num_dropped == count and not client.held()
    assert client.draft([sequence], np.array([2], np.int32)).num_nodes.shape == (1,)  # Built again from its tokens.
    assert [record.message.split(";")[0] for record in caplog.records if record.exc_info] == [
        "A reply of the draft servers is dropped"
    ]
