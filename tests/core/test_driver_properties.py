"""Whatever the workload, the instances and their deaths: every request ends exactly once with exactly its tokens."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.commands import StartChunk
from seer_jax.core.context import OracleEstimator
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.eventlog import encode_command
from seer_jax.core.events import ChunkFinished, GroupsSubmitted, InstanceJoined, InstanceLost
from seer_jax.core.scheduling import GroupRoundRobinPolicy, SeerPolicy
from seer_jax.core.types import output_sha256
from tests.core.fake_cluster import (
    FakeCluster,
    Scenario,
    capacity,
    expected_responses,
    make_group,
    make_info,
    property_settings,
    scenarios,
)

POLICIES = ["seer", "group_round_robin"]


def make_driver(policy: str, scenario: Scenario, *, oracle: bool = False) -> RolloutDriver:
    estimator = OracleEstimator(scenario.true_lengths) if oracle else None
    if policy == "group_round_robin":
        return RolloutDriver(GroupRoundRobinPolicy(), estimator)
    seer = SeerPolicy(
        chunk_size=scenario.chunk_size,
        starvation_interval=scenario.starvation_interval,
        prefetch_chunks=scenario.prefetch_chunks,
    )
    return RolloutDriver(seer, estimator)


def make_cluster(policy: str, scenario: Scenario, *, oracle: bool = False, loss_rate: float = 0.0) -> FakeCluster:
    return FakeCluster(
        driver=make_driver(policy, scenario, oracle=oracle),
        infos=scenario.infos,
        true_lengths=scenario.true_lengths,
        seed=scenario.seed,
        loss_rate=loss_rate,
        max_queued=scenario.prefetch_chunks if policy == "seer" else None,
    )


def assert_complete(samples, scenario: Scenario) -> None:
    assert len(samples) == len(scenario.true_lengths)
    assert {sample.request_id: sample.token_ids.tolist() for sample in samples} == expected_responses(scenario)
    for sample in samples:
        assert sample.logprobs.tolist() == (-sample.token_ids.astype("float32") / 7).tolist()


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@property_settings(max_examples=40)
@given(scenario=scenarios(), loss_rate=st.sampled_from([0.0, 0.1, 0.3]))
def test_every_request_finishes_once_with_its_tokens_even_when_instances_die(policy, oracle, scenario, loss_rate):
    cluster = make_cluster(policy, scenario, oracle=oracle, loss_rate=loss_rate)
    assert_complete(cluster.run(scenario.groups), scenario)
    assert all(not load.in_flight and not load.num_reserved_pages for load in cluster.driver.loads.values())


def test_the_fake_cluster_does_lose_instances_with_work_on_them():
    groups = [make_group(i, size=4) for i in range(4)]
    lengths = {(i, k): 12 for i in range(4) for k in range(4)}
    driver = RolloutDriver(SeerPolicy(chunk_size=3, starvation_interval=0, prefetch_chunks=1))
    cluster = FakeCluster(driver=driver, infos=[make_info(0)], true_lengths=lengths, seed=0, loss_rate=0.3)
    samples = cluster.run(groups)
    assert cluster.num_losses > 3
    assert max(sample.num_chunks for sample in samples) > 4, "a lost chunk counts as one taken"


@property_settings(max_examples=30)
@given(scenario=scenarios())
def test_output_does_not_depend_on_policy_or_losses(scenario):
    runs = [make_cluster(policy, scenario, loss_rate=rate) for policy in POLICIES for rate in (0.0, 0.2)]
    assert len({output_sha256(cluster.run(scenario.groups)) for cluster in runs}) == 1


@pytest.mark.parametrize("policy", POLICIES)
@property_settings(max_examples=25)
@given(scenario=scenarios())
def test_driver_is_reused_over_iterations(policy, scenario):
    cluster = make_cluster(policy, scenario, loss_rate=0.1)
    for version in (0, 0, 3):
        samples = cluster.run(scenario.groups, policy_version=version)
        assert_complete(samples, scenario)
        assert {sample.policy_version for sample in samples} == {version}


@pytest.mark.parametrize("policy", POLICIES)
@property_settings(max_examples=20)
@given(scenario=scenarios())
def test_same_events_give_same_commands_even_if_the_driver_is_restored_before_each_of_them(policy, scenario):
    log = []
    cluster = make_cluster(policy, scenario, loss_rate=0.1)
    cluster.observers.append(lambda event, commands: log.append((event, [encode_command(c) for c in commands])))
    again, resumed = make_driver(policy, scenario), make_driver(policy, scenario)
    for info in scenario.infos:  # These joined before the observer was there.
        for driver in (again, resumed):
            driver.handle(InstanceJoined(info=info, policy_version=0))
    cluster.run(scenario.groups)
    for event, commands in log:
        assert [encode_command(c) for c in again.handle(event)] == commands
        snapshot = pickle.loads(pickle.dumps(resumed.snapshot()))
        resumed = make_driver(policy, scenario)
        resumed.restore(snapshot)
        assert [encode_command(c) for c in resumed.handle(event)] == commands


@property_settings(max_examples=20)
@given(scenario=scenarios())
def test_a_snapshot_does_not_change_with_later_events(scenario):
    cluster = make_cluster("seer", scenario)
    frozen = []

    def observe(event, commands):
        if isinstance(event, GroupsSubmitted):
            snapshot = cluster.driver.snapshot()
            frozen.append((snapshot, pickle.dumps(snapshot)))

    cluster.observers.append(observe)
    cluster.run(scenario.groups)
    [(snapshot, before)] = frozen
    assert pickle.dumps(snapshot) == before


@property_settings(max_examples=30)
@given(scenario=scenarios())
def test_baseline_reserves_nothing_splits_nothing_and_keeps_groups_whole(scenario):
    cluster = make_cluster("group_round_robin", scenario)
    starts: list[StartChunk] = []
    cluster.observers.append(lambda event, commands: starts.extend(c for c in commands if isinstance(c, StartChunk)))
    samples = cluster.run(scenario.groups)
    assert all(sample.num_chunks == 1 for sample in samples)
    assert [s.chunk.request_id for s in starts] == list(scenario.true_lengths), "all at once, in order of submission"
    assert all(s.chunk.num_reserved_pages == 0 for s in starts)
    assert all(len(s.chunk.token_ids) + s.chunk.max_chunk_tokens == s.chunk.max_total_tokens for s in starts)
    for number, group in enumerate(scenario.groups):
        placed = {s.instance_id for s in starts if s.chunk.request_id.group_id == group.group_id}
        total = len(group.prompt_token_ids) + group.sampling.max_tokens
        able = [info.instance_id for info in scenario.infos if capacity(info) >= total]
        assert placed == {able[number % len(able)]}


@property_settings(max_examples=30)
@given(scenario=scenarios())
def test_late_results_of_a_lost_instance_change_nothing(scenario):
    cluster = make_cluster("seer", scenario, loss_rate=0.3)
    lost: set[int] = set()

    def observe(event, commands):
        if isinstance(event, InstanceLost):
            lost.add(event.instance_id)
        if isinstance(event, ChunkFinished) and event.instance_id in lost:
            assert commands == []

    cluster.observers.append(observe)
    cluster.run(scenario.groups)
