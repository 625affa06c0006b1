"""The draft server in Ray: instances draft from each other's requests; its death costs acceptance only."""

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import ray

from seer_jax.config.schema import RolloutConfig, RunConfig, SpeculationConfig
from seer_jax.core.commands import Command, EmitSample
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import Event
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
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
