"""Baselines and options of Seer beyond the paper: whatever they change, every request ends once with its tokens."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.commands import EmitSample, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.eventlog import encode_command
from seer_jax.core.events import InstanceJoined
from seer_jax.core.scheduling import make_estimator, make_policy
from seer_jax.core.types import output_sha256
from tests.core.fake_cluster import FakeCluster, Scenario, expected_responses, property_settings, scenarios

VARIANTS = {
    "divided": {},
    "oracle": {},
    "streamrl_oracle": {},
    "seer+posterior": {"length_estimator": "posterior"},
}


def make_driver(variant: str, scenario: Scenario) -> RolloutDriver:
    config = RolloutConfig(
        chunk_size=scenario.chunk_size,
        starvation_interval=scenario.starvation_interval or 3,
        prefetch_chunks=scenario.prefetch_chunks,
        **VARIANTS[variant],
    )
    name = variant.partition("+")[0]
    policy = make_policy(name, config, scenario.true_lengths)
    return RolloutDriver(policy, make_estimator(name, config, scenario.true_lengths))


def make_cluster(variant: str, scenario: Scenario, loss_rate: float) -> FakeCluster:
    return FakeCluster(
        driver=make_driver(variant, scenario),
        infos=scenario.infos,
        true_lengths=scenario.true_lengths,
        seed=scenario.seed,
        loss_rate=loss_rate,
        max_queued=None if variant == "streamrl_oracle" else scenario.prefetch_chunks,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@property_settings(max_examples=25)
@given(scenario=scenarios(), loss_rate=st.sampled_from([0.0, 0.1, 0.3]))
def test_every_request_finishes_once_with_its_tokens(variant, scenario, loss_rate):
    cluster = make_cluster(variant, scenario, loss_rate)
    for version in (0, 1):
        samples = cluster.run(scenario.groups, policy_version=version)
        assert len(samples) == len(scenario.true_lengths)
        assert {sample.request_id: sample.token_ids.tolist() for sample in samples} == expected_responses(scenario)
    assert all(not load.in_flight and not load.num_reserved_pages for load in cluster.driver.loads.values())


@pytest.mark.parametrize("variant", VARIANTS)
@property_settings(max_examples=15)
@given(scenario=scenarios())
def test_a_driver_restored_before_every_event_agrees(variant, scenario):
    log = []
    cluster = make_cluster(variant, scenario, loss_rate=0.1)
    cluster.observers.append(lambda event, commands: log.append((event, [encode_command(c) for c in commands])))
    resumed = make_driver(variant, scenario)
    for info in scenario.infos:  # These joined before the observer was there.
        resumed.handle(InstanceJoined(info=info, policy_version=0))
    cluster.run(scenario.groups)
    for event, commands in log:
        snapshot = pickle.loads(pickle.dumps(resumed.snapshot()))
        resumed = make_driver(variant, scenario)
        resumed.restore(snapshot)
        assert [encode_command(c) for c in resumed.handle(event)] == commands
    assert dict(resumed.firings) == dict(cluster.driver.firings)


@property_settings(max_examples=20)
@given(scenario=scenarios())
def test_output_depends_on_no_option(scenario):
    runs = [make_cluster(variant, scenario, loss_rate=0.1) for variant in VARIANTS]
    assert len({output_sha256(cluster.run(scenario.groups)) for cluster in runs}) == 1


@pytest.mark.parametrize("variant", ["divided", "oracle", "seer+posterior"])
@property_settings(max_examples=20)
@given(scenario=scenarios())
def test_chunked_policies_reserve_and_never_exceed_the_chunk_size(variant, scenario):
    cluster = make_cluster(variant, scenario, loss_rate=0.1)

    def observe(event, commands):
        for command in commands:
            if isinstance(command, StartChunk):
                assert 1 <= command.chunk.max_chunk_tokens <= scenario.chunk_size and command.chunk.num_reserved_pages

    cluster.observers.append(observe)
    cluster.run(scenario.groups)


@property_settings(max_examples=30)
@given(scenario=scenarios())
def test_streamrl_runs_whole_groups_in_one_piece_at_one_instance(scenario):
    cluster = make_cluster("streamrl_oracle", scenario, loss_rate=0.0)
    places: dict[int, set[int]] = {}

    def observe(event, commands):
        for command in commands:
            match command:
                case StartChunk(chunk=chunk):
                    places.setdefault(chunk.request_id.group_id, set()).add(command.instance_id)
                    assert chunk.num_reserved_pages == 0
                case EmitSample(sample=sample):
                    assert sample.num_chunks == 1

    cluster.observers.append(observe)
    cluster.run(scenario.groups)
    assert all(len(instance_ids) == 1 for instance_ids in places.values())


@property_settings(max_examples=30)
@given(scenario=scenarios())
def test_no_group_starves(scenario):
    """The safeguard's bound holds whatever estimates say."""
    cluster = make_cluster("seer+posterior", scenario, loss_rate=0.1)
    interval = scenario.starvation_interval or 3
    unserved = {group.group_id: 0 for group in scenario.groups}

    def observe(event, commands):
        for command in commands:
            if isinstance(command, StartChunk):
                for group_id in unserved:
                    unserved[group_id] += 1
                unserved[command.chunk.request_id.group_id] = 0
        waiting = {name.group_id for name in cluster.driver.buffer.waiting}
        for group_id in unserved.keys() - waiting:
            unserved[group_id] = 0
        assert max(unserved.values()) <= interval * len(scenario.groups)

    cluster.observers.append(observe)
    cluster.run(scenario.groups)
