"""Instances as Ray actors: the tokens of the in-process run, also when an instance is killed."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import pytest
import ray

from seer_jax.config.schema import RolloutConfig, RunConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import InstanceLostError, ProtocolError
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import RequestChunk, SamplingParams
from seer_jax.distributed.ray_cluster import RayCluster, start_ray
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from tests.engine import tiny

pytestmark = pytest.mark.ray

CONFIG = RunConfig(
    engine=dataclasses.replace(tiny.CONFIG, deterministic=True),
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
    cluster = build_local_cluster(CONFIG, tiny.MODEL, tiny.params())
    return RolloutRunner(cluster, make_driver()).run(tiny.groups(3, 4, SAMPLING))


def make_driver() -> RolloutDriver:
    return RolloutDriver(make_policy("seer", CONFIG.rollout))


def test_actors_give_the_tokens_of_the_in_process_run_and_take_new_weights(expected: RolloutResult) -> None:
    cluster = RayCluster(CONFIG, tiny.MODEL, tiny.params())
    runner = RolloutRunner(cluster, make_driver())
    result = runner.run(tiny.groups(3, 4, SAMPLING))
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert result.stats.reprefilled_tokens == 0 and result.stats.num_chunks > 12
    updated = runner.run(tiny.groups(3, 4, SAMPLING), policy_version=1, get_params=lambda: tiny.params(1))
    assert updated.stats.output_sha256 != expected.stats.output_sha256
    back = runner.run(tiny.groups(3, 4, SAMPLING), policy_version=2, get_params=tiny.params)
    assert back.stats.output_sha256 == expected.stats.output_sha256
    assert {sample.policy_version for sample in back.samples} == {2}
    runner.close()


class KillingCluster(RayCluster):
    """Kills an instance's process after it got its third batch of chunks."""

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """Send, then kill."""
        super().send(chunks)
        self.num_sends = getattr(self, "num_sends", 0) + (0 in chunks)
        if self.num_sends == 3 and 0 in self._actors:
            ray.kill(self._actors[0])


def test_killed_instance_loses_no_token(expected: RolloutResult) -> None:
    cluster = KillingCluster(CONFIG, tiny.MODEL, tiny.params())
    result = RolloutRunner(cluster, make_driver()).run(tiny.groups(3, 4, SAMPLING))
    assert list(cluster._actors) == [1]
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
