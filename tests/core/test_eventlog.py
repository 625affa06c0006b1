"""A recorded run, read back from JSON, replays to the very same commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from seer_jax.core.commands import Command
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ProtocolError
from seer_jax.core.eventlog import decode_command, decode_event, decode_events, encode_command, encode_event, replay
from seer_jax.core.events import GroupsSubmitted, InstanceJoined, InstanceReport
from seer_jax.core.scheduling import SeerPolicy
from seer_jax.core.types import InstanceStatus, RolloutGroup, SamplingParams
from tests.core.fake_cluster import FakeCluster, finish, make_group, make_info, property_settings, scenarios


@property_settings(max_examples=15)
@given(scenario=scenarios())
def test_a_recorded_run_replays_to_the_same_commands(scenario):
    policy = SeerPolicy(chunk_size=scenario.chunk_size, starvation_interval=3, prefetch_chunks=1)
    lines = [json.dumps(encode_event(InstanceJoined(info=info, policy_version=0))) for info in scenario.infos]
    recorded: list[Command] = []
    cluster = FakeCluster(
        driver=RolloutDriver(policy),
        infos=scenario.infos,
        true_lengths=scenario.true_lengths,
        seed=scenario.seed,
        loss_rate=0.1,
    )
    cluster.observers.append(lambda event, commands: lines.append(json.dumps(encode_event(event))))
    cluster.observers.append(lambda event, commands: recorded.extend(commands))
    cluster.run(scenario.groups)
    replayed = list(replay(decode_events(lines), RolloutDriver(policy)))
    assert [encode_command(c) for c in replayed] == [encode_command(c) for c in recorded]
    assert all(encode_command(decode_command(encode_command(c))) == encode_command(c) for c in recorded)


def test_every_field_survives_the_log():
    sampling = SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(1, 2), seed=2**60)
    prompt = np.asarray([3, 1, 4], np.int32)
    group = RolloutGroup(group_id=5, prompt_token_ids=prompt, group_size=2, sampling=sampling, iteration=6)
    event = GroupsSubmitted(groups=(group,), policy_version=3)
    decoded = decode_event(json.loads(json.dumps(encode_event(event))))
    assert isinstance(decoded, GroupsSubmitted) and decoded.policy_version == 3
    [copy] = decoded.groups
    assert (copy.group_id, copy.group_size, copy.sampling, copy.iteration) == (5, 2, sampling, 6)
    assert copy.prompt_token_ids.dtype == np.int32 and copy.prompt_token_ids.tolist() == [3, 1, 4]


def test_log_probabilities_and_expert_ids_survive_bit_for_bit_and_the_kv_handle_loses_only_its_ref():
    driver = RolloutDriver(SeerPolicy(chunk_size=4, starvation_interval=0, prefetch_chunks=0))
    driver.handle(InstanceJoined(info=make_info(0), policy_version=0))
    [start, _] = driver.handle(GroupsSubmitted(groups=(make_group(0),), policy_version=0))
    event = finish(0, start.chunk, 12)
    assert decode_event(encode_event(event)).expert_ids is None
    event = replace(event, expert_ids=np.arange(16, dtype=np.int16).reshape(4, 2, 2) - 1)
    decoded = decode_event(json.loads(json.dumps(encode_event(event))))
    assert decoded.expert_ids.dtype == np.int16 and decoded.expert_ids.tolist() == event.expert_ids.tolist()
    assert decoded.logprobs.dtype == np.float32 and decoded.logprobs.tobytes() == event.logprobs.tobytes()
    assert (decoded.kv.num_tokens, decoded.kv.policy_version, decoded.kv.ref) == (7, 0, None)
    assert event.kv.ref is not None


def test_telemetry_survives_the_log():
    status = InstanceStatus(
        instance_id=0, num_running=1, num_waiting=0, num_free_pages=2, num_total_pages=8, step_time_s=0.25
    )
    event = InstanceReport(status=status)
    assert decode_event(json.loads(json.dumps(encode_event(event)))) == event


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "Tick"}, "unknown type 'Tick'"),
        ({}, "unknown type None"),
        ({"type": "IterationDone"}, "IterationDone is none of"),
        ({"type": "InstanceLost"}, "has fields"),
        ({"type": "InstanceLost", "instance_id": 1, "why": "fire"}, "has fields"),
    ],
)
def test_a_line_that_is_no_event_of_this_version_is_refused(data, message):
    with pytest.raises(ProtocolError, match=message):
        decode_event(data)
