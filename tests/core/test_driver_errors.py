"""What the driver refuses, with which error, and that a refused event changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from seer_jax.core.commands import IterationDone, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import CapacityError, ConfigError, InstanceLostError, ProtocolError
from seer_jax.core.eventlog import encode_command
from seer_jax.core.events import GroupsSubmitted, InstanceJoined, InstanceLost, InstanceReport
from seer_jax.core.scheduling import GroupRoundRobinPolicy, SeerPolicy
from seer_jax.core.types import InstanceStatus, KVHandle, RequestId, SamplingParams
from tests.core.fake_cluster import finish, make_group, make_info

SEER = SeerPolicy(chunk_size=4, starvation_interval=0, prefetch_chunks=0)


def started(policy=SEER, *groups, instances: int = 1):
    """A driver with instances and groups in flight; returns it with the chunks started."""
    driver = RolloutDriver(policy)
    for number in range(instances):
        driver.handle(InstanceJoined(info=make_info(number), policy_version=0))
    commands = driver.handle(GroupsSubmitted(groups=groups or (make_group(0),), policy_version=0))
    return driver, [command.chunk for command in commands]


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (make_group(3, max_tokens=29), ConfigError, r"engine\.max_model_len: is 32, but group 3.* = 33 tokens.* to 28"),
        (make_group(3, prompt=40), ConfigError, r"engine\.max_model_len: .*drop the prompt"),
        (make_group(3, prompt=0), ConfigError, r"data: the prompt of group 3 is empty"),
        (make_group(3, size=0), ConfigError, r"rollout\.group_size: is 0"),
        (make_group(3, max_tokens=0), ConfigError, r"sampling\.max_tokens: is 0"),
        (
            replace(make_group(3), sampling=SamplingParams(max_tokens=4, stop_token_ids=(1, 2, 3, 4, 5))),
            ConfigError,
            r"sampling\.stop_token_ids: are 5 tokens \(at most 4",
        ),
    ],
)
def test_a_group_that_cannot_run_is_refused_before_anything_starts(group, error, message):
    driver = RolloutDriver(SEER)
    driver.handle(InstanceJoined(info=make_info(0), policy_version=0))
    with pytest.raises(error, match=message):
        driver.handle(GroupsSubmitted(groups=(make_group(0), group), policy_version=0))
    assert len(driver.buffer) == 0
    driver.handle(GroupsSubmitted(groups=(make_group(0),), policy_version=0))


def test_a_request_larger_than_every_instances_memory_is_refused_with_the_pages_needed():
    driver = RolloutDriver(SEER)
    driver.handle(InstanceJoined(info=make_info(0, num_total_pages=3), policy_version=0))
    with pytest.raises(CapacityError, match=r"needs 4 KV pages, only 3 exist \(raise engine\.num_pages to 5") as caught:
        driver.handle(GroupsSubmitted(groups=(make_group(0),), policy_version=0))
    assert (caught.value.needed, caught.value.available) == (4, 3)


def test_one_instance_that_is_large_enough_suffices():
    driver = RolloutDriver(GroupRoundRobinPolicy())
    for number, pages in enumerate((3, 4)):
        driver.handle(InstanceJoined(info=make_info(number, num_total_pages=pages), policy_version=0))
    commands = driver.handle(GroupsSubmitted(groups=(make_group(0), make_group(1)), policy_version=0))
    assert [command.instance_id for command in commands] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ((), ConfigError, "data: no prompts"),
        ((make_group(0), make_group(0)), ProtocolError, "group 0 is submitted twice"),
    ],
)
def test_empty_and_repeated_groups_are_refused(groups, error, message):
    driver = RolloutDriver(SEER)
    driver.handle(InstanceJoined(info=make_info(0), policy_version=0))
    with pytest.raises(error, match=message):
        driver.handle(GroupsSubmitted(groups=groups, policy_version=0))


def test_groups_without_an_instance_are_refused():
    with pytest.raises(InstanceLostError, match="no instance"):
        RolloutDriver(SEER).handle(GroupsSubmitted(groups=(make_group(0),), policy_version=0))


def test_an_iteration_cannot_start_inside_another_nor_with_older_weights():
    driver, [chunk] = started(SEER, make_group(0, size=1))
    with pytest.raises(ProtocolError, match="while 1 requests are unfinished"):
        driver.handle(GroupsSubmitted(groups=(make_group(1),), policy_version=0))
    assert isinstance(driver.handle(finish(0, chunk, 1))[-1], IterationDone)
    driver.handle(GroupsSubmitted(groups=(make_group(1, size=1),), policy_version=5))
    driver.handle(finish(0, replace(chunk, request_id=RequestId(1, 0), policy_version=5), 1))
    with pytest.raises(ProtocolError, match="policy version 4 after 5"):
        driver.handle(GroupsSubmitted(groups=(make_group(2),), policy_version=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_version": 1}, "policy version 1, not 0"),
        ({"chunk_index": 1}, "stale"),
        ({"request_id": RequestId(9, 9)}, "in flight"),
        ({"instance_id": 7}, "instance 7 has not joined"),
        ({"instance_id": 1}, "in flight at instance 1"),
        ({"finish_reason": "length"}, "'length' at 8 of 16"),
        ({"finish_reason": "abort"}, "'abort'"),
        ({"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32)}, "0 tokens"),
        ({"token_ids": np.zeros(5, np.int32), "logprobs": np.zeros(5, np.float32)}, "5 tokens"),
        ({"logprobs": np.zeros(3, np.float32)}, "3 log-probabilities"),
        ({"expert_ids": np.zeros((3, 2, 2), np.int16)}, "4 tokens and expert ids of 3"),
        ({"kv": KVHandle(num_tokens=9, policy_version=0)}, "KV of 9 tokens"),
        ({"kv": KVHandle(num_tokens=8, policy_version=0)}, "KV of 8 tokens, at most 7"),
    ],
)
def test_a_result_that_no_chunk_in_flight_can_have_is_a_protocol_error_and_changes_nothing(changes, message):
    driver, chunks = started(SEER, make_group(0, size=1), instances=2)
    twin, _ = started(SEER, make_group(0, size=1), instances=2)
    good = finish(0, chunks[0], 12)
    with pytest.raises(ProtocolError, match=message):
        driver.handle(replace(good, **changes))
    expected = [encode_command(command) for command in twin.handle(good)]
    assert [encode_command(command) for command in driver.handle(good)] == expected


@pytest.mark.parametrize("second", [None, np.zeros((4, 2, 3), np.int16)])
def test_expert_ids_of_another_shape_or_in_some_chunks_only_are_a_protocol_error(second):
    driver, [chunk] = started(SEER, make_group(0, size=1))
    [start] = driver.handle(replace(finish(0, chunk, 12), expert_ids=np.ones((4, 2, 2), np.int16)))
    with pytest.raises(ProtocolError, match="the request's first chunk"):
        driver.handle(replace(finish(0, start.chunk, 12), expert_ids=second))
    [start] = driver.handle(replace(finish(0, start.chunk, 12), expert_ids=np.full((4, 2, 2), 2, np.int16)))
    driver.restore(driver.snapshot())
    emit = driver.handle(replace(finish(0, start.chunk, 12), expert_ids=np.full((4, 2, 2), 3, np.int16)))[0]
    assert emit.sample.expert_ids[:, 0, 0].tolist() == 4 * [1] + 4 * [2] + 4 * [3]


def test_a_result_delivered_twice_is_a_protocol_error():
    driver, [chunk, _] = started()
    driver.handle(finish(0, chunk, 12))
    with pytest.raises(ProtocolError, match="stale"):
        driver.handle(finish(0, chunk, 12))


def test_going_back_to_the_buffer_at_the_limit_is_a_protocol_error():
    driver, [chunk] = started(SEER, make_group(0, size=1, max_tokens=4))
    with pytest.raises(ProtocolError, match="'chunk' at 8 of 8"):
        driver.handle(replace(finish(0, chunk, 4), finish_reason="chunk"))


def test_losing_the_last_instance_is_an_error_and_a_new_one_resumes_from_the_last_returned_token():
    driver, [chunk] = started(SEER, make_group(0, size=1))
    [start] = driver.handle(finish(0, chunk, 12))
    with pytest.raises(InstanceLostError, match="1 requests remain"):
        driver.handle(InstanceLost(instance_id=0))
    assert driver.handle(InstanceLost(instance_id=0)) == [], "a second report of the same death"
    assert driver.handle(finish(0, start.chunk, 12)) == [], "a late result"
    [again] = driver.handle(InstanceJoined(info=make_info(1), policy_version=0))
    np.testing.assert_array_equal(again.chunk.token_ids, start.chunk.token_ids)
    assert again.instance_id == 1 and again.chunk.chunk_index == 2
    assert again.chunk.kv == start.chunk.kv == KVHandle(num_tokens=7, policy_version=0, ref="somewhere")


def test_losing_the_only_instance_large_enough_is_an_error():
    driver = RolloutDriver(SEER)
    for number, pages in enumerate((4, 3)):
        driver.handle(InstanceJoined(info=make_info(number, num_total_pages=pages), policy_version=0))
    driver.handle(GroupsSubmitted(groups=(make_group(0),), policy_version=0))
    with pytest.raises(InstanceLostError, match="none of the 1 left can hold a request of 16 tokens"):
        driver.handle(InstanceLost(instance_id=0))


def test_an_idle_driver_may_lose_every_instance():
    driver = RolloutDriver(SEER)
    driver.handle(InstanceJoined(info=make_info(0), policy_version=0))
    assert driver.handle(InstanceLost(instance_id=0)) == []


@pytest.mark.parametrize("lost_first", [False, True])
def test_an_instance_id_is_used_once(lost_first):
    driver = RolloutDriver(SEER)
    driver.handle(InstanceJoined(info=make_info(0), policy_version=0))
    if lost_first:
        driver.handle(InstanceLost(instance_id=0))
    with pytest.raises(ProtocolError, match="needs a new id"):
        driver.handle(InstanceJoined(info=make_info(0), policy_version=0))


def test_an_instance_with_other_weights_cannot_join_an_iteration():
    driver, _ = started()
    with pytest.raises(ProtocolError, match="policy version 1 during an iteration of version 0"):
        driver.handle(InstanceJoined(info=make_info(1), policy_version=1))


def test_an_unknown_instance_cannot_be_lost():
    with pytest.raises(ProtocolError, match="instance 4 has not joined"):
        RolloutDriver(SEER).handle(InstanceLost(instance_id=4))


def test_kv_of_other_weights_is_dropped():
    driver, [chunk, _] = started(SEER, make_group(0, size=2))
    stale = KVHandle(num_tokens=7, policy_version=3)
    [start] = driver.handle(replace(finish(0, chunk, 12), kv=stale))
    assert start.chunk.request_id == (0, 0) and start.chunk.kv is None


def test_the_latest_report_of_each_live_instance_is_kept():
    driver, _ = started(SEER, make_group(0), instances=2)
    status = InstanceStatus(instance_id=1, num_running=1, num_waiting=0, num_free_pages=2, num_total_pages=8)
    for num_steps in (1, 2):
        assert driver.handle(InstanceReport(status=replace(status, num_steps=num_steps))) == []
    assert driver.reports == {1: replace(status, num_steps=2)}
    driver.handle(InstanceLost(instance_id=1))
    assert driver.handle(InstanceReport(status=status)) == [] and driver.reports == {}
    with pytest.raises(ProtocolError):
        driver.handle(InstanceReport(status=replace(status, instance_id=5)))


def test_turns_of_the_baseline_do_not_depend_on_the_order_of_joining():
    driver = RolloutDriver(GroupRoundRobinPolicy())
    for number in (2, 0, 1):
        driver.handle(InstanceJoined(info=make_info(number), policy_version=0))
    groups = tuple(make_group(number, size=1) for number in range(4))
    commands = driver.handle(GroupsSubmitted(groups=groups, policy_version=0))
    assert [command.instance_id for command in commands] == [0, 1, 2, 0]


def test_lost_groups_of_the_baseline_go_whole_to_the_remaining_instances_in_turn():
    groups = tuple(make_group(number) for number in range(6))
    driver, _ = started(GroupRoundRobinPolicy(), *groups, instances=3)
    commands = driver.handle(InstanceLost(instance_id=0))
    assert all(isinstance(command, StartChunk) for command in commands)
    moved = [(command.chunk.request_id, command.instance_id) for command in commands]
    assert moved == [((0, 0), 1), ((0, 1), 1), ((3, 0), 2), ((3, 1), 2)]
