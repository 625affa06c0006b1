"""Instances that come late: Ray has a place for them only while the rollout runs."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from seer_jax.core.events import ChunkFinished, Event, InstanceJoined, InstanceLost
from seer_jax.distributed import ray_cluster
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutResult
from tests.distributed.test_ray_faults import CONFIG, joined, roll_out, start
from tests.engine import tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def expected() -> RolloutResult:
    """Of two instances in this process."""
    return roll_out(build_local_cluster(CONFIG, tiny.MODEL, tiny.params()))[0]


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Cluster]:
    """A Ray cluster that this process is connected to; a node has room for one instance, and there is one node."""
    monkeypatch.setattr(ray_cluster, "actor_resources", lambda *_: {"num_cpus": 0, "resources": {"slot": 1}})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"slot": 1}})
    try:
        ray.init(address=cluster.address, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_an_instance_joins_when_a_node_comes_and_takes_chunks(expected, nodes):
    cluster = start(min_instances=1)
    assert [info.instance_id for info in cluster.infos] == [0] and cluster.expects_instances
    first, log = roll_out(cluster)
    assert joined(log) == [0] and first.stats.output_sha256 == expected.stats.output_sha256
    nodes.add_node(num_cpus=1, resources={"slot": 1})
    events = []
    while not any(isinstance(event, InstanceJoined) for event in events):
        events += cluster.wait()  # As a rollout under way would.
    second, log = roll_out(cluster)
    assert second.stats.output_sha256 == expected.stats.output_sha256 and second.stats.instances_lost == 0
    assert {event.instance_id for event in log if isinstance(event, ChunkFinished)} == {0, 1}
    cluster.close()


def test_a_node_comes_and_goes_in_the_middle_of_a_rollout(expected, nodes, monkeypatch):
    """It takes chunks as soon as it is there; what it had goes on elsewhere when it is gone."""
    cluster = start(min_instances=1)
    wait, seen, added = cluster.wait, [], []

    def wait_and_change() -> list[Event]:
        """The second node comes after 5 chunks and goes after 5 of its own."""
        events = wait()
        seen.extend(event for event in events if isinstance(event, ChunkFinished))
        if not added and len(seen) >= 5:
            added.append(nodes.add_node(num_cpus=1, resources={"slot": 1}))
            while not any(isinstance(event, InstanceJoined) for event in events):
                events += wait()
        if len(added) == 1 and sum(event.instance_id == 1 for event in seen) >= 5:
            nodes.remove_node(added[0])
            added.append(None)
            while not any(isinstance(event, InstanceLost) for event in events):
                events += wait()
        return events

    monkeypatch.setattr(cluster, "wait", wait_and_change)
    result, log = roll_out(cluster)
    assert result.stats.output_sha256 == expected.stats.output_sha256 and result.stats.instances_lost == 1
    finished = [event.instance_id for event in log if isinstance(event, ChunkFinished)]
    assert joined(log) == [0, 1] and finished.count(1) >= 5 and set(finished[:5]) == set(finished[-5:]) == {0}
    assert cluster.expects_instances, "a replacement waits for another node"
    cluster.close()
