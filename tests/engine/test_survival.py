"""A rollout survives what kills instances and its own process: the same tokens, nothing lost, nothing doubled."""

import dataclasses
import json
import random

import pytest

from seer_jax.config.schema import ChaosConfig, RolloutConfig, RunConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import InstanceLostError
from seer_jax.core.eventlog import decode_events, encode_event
from seer_jax.core.events import Event, InstanceJoined, InstanceLost
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.engine import cluster
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from tests.engine import tiny

SAMPLING = SamplingParams(max_tokens=40, stop_token_ids=(1, 2), seed=5)
CONFIG = RunConfig(
    engine=dataclasses.replace(tiny.CONFIG, deterministic=True, num_pages=64),
    rollout=RolloutConfig(instances=2, chunk_size=8, prefetch_chunks=1, max_replacements=100),
)


def roll_out(
    chaos: ChaosConfig | None = None,
    *,
    policy: str = "seer",
    instances: int = 2,
    replacements: int = 100,
    first_instance_id: int = 0,
    history: list[Event] | None = None,
    log: list[Event] | None = None,
) -> RolloutResult:
    rollout = dataclasses.replace(CONFIG.rollout, instances=instances, max_replacements=replacements)
    chaos = chaos or ChaosConfig()
    config = dataclasses.replace(CONFIG, rollout=rollout, chaos=chaos)
    runner = RolloutRunner(
        build_local_cluster(config, tiny.MODEL, tiny.params(), first_instance_id=first_instance_id),
        RolloutDriver(make_policy(policy, rollout)),
        chaos=chaos,
        history=history or (),
        on_event=None if log is None else lambda _, event, __: log.append(event),
    )
    return runner.run(tiny.groups(3, 4, SAMPLING))


@pytest.fixture(scope="module")
def expected() -> RolloutResult:
    return roll_out()


def check(result: RolloutResult, expected: RolloutResult) -> None:
    """Also the log-probabilities, bit for bit, and no request twice."""
    assert result.stats.output_sha256 == expected.stats.output_sha256
    assert [s.request_id for s in result.samples] == [s.request_id for s in expected.samples]
    for sample, same in zip(result.samples, expected.samples, strict=True):
        assert sample.logprobs.tobytes() == same.logprobs.tobytes()


@pytest.mark.parametrize("policy", ["seer", "group_round_robin"])
def test_killed_instances_are_replaced_and_their_chunks_run_again(policy, expected):
    result = roll_out(ChaosConfig(kill_instance=3, seed=1), policy=policy)
    check(result, expected)
    assert result.stats.instances_lost == 3 and result.stats.chunks_resumed > 0


def test_kv_that_died_is_computed_again(expected):
    assert expected.stats.re_prefilled_tokens == expected.stats.instances_lost == expected.stats.chunks_resumed == 0
    assert roll_out(ChaosConfig(kill_instance=3, seed=1)).stats.re_prefilled_tokens > 0


def test_the_only_instance_is_replaced(expected):
    result = roll_out(ChaosConfig(kill_instance=2), instances=1)
    check(result, expected)
    assert result.stats.instances_lost == 2


def test_without_replacements_the_others_do_the_work_and_the_last_one_cannot_go(expected):
    check(roll_out(ChaosConfig(kill_instance=1), replacements=0), expected)
    with pytest.raises(InstanceLostError, match="requests remain"):
        roll_out(ChaosConfig(kill_instance=1), instances=1, replacements=0)


def test_replacements_are_counted_anew_in_each_rollout():
    rollout = dataclasses.replace(CONFIG.rollout, instances=1, max_replacements=1)
    instances = build_local_cluster(dataclasses.replace(CONFIG, rollout=rollout), tiny.MODEL, tiny.params())
    for version in range(3):
        instances.start_iteration(version, None)
        instances.kill(version)
        assert instances.expects_instances
        assert [type(event) for event in [*instances.wait(), *instances.wait()]] == [InstanceLost, InstanceJoined]
    instances.kill(3)
    assert not instances.expects_instances
    instances.close()


def test_a_slow_instance_changes_no_token(expected, monkeypatch):
    slept = []
    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    check(roll_out(ChaosConfig(slow_instance=1.5)), expected)
    assert sum(slept) > 0 and min(slept) == 0  # The other instance is not slow.


def test_more_kills_than_can_be_noticed_at_once(expected):
    """All are due in the last moments: nobody is killed twice, and every loss is followed by a new instance."""
    log: list[Event] = []
    roll_out(log=log)
    for seed in range(8):
        chaos = ChaosConfig(kill_instance=6, seed=seed)
        result = roll_out(chaos)
        check(result, expected)
        assert result.stats.instances_lost == 6
        check(roll_out(chaos, first_instance_id=10, history=log[: len(log) * 3 // 4]), expected)


def test_figures_of_a_resumed_rollout_are_those_of_its_rest(expected):
    log: list[Event] = []
    roll_out(log=log)
    stats = roll_out(first_instance_id=10, history=log[: len(log) * 3 // 4]).stats
    assert stats.generated_tokens == expected.stats.generated_tokens and stats.instances_lost == 0
    assert stats.tokens_per_s * stats.rollout_time_s < 0.6 * stats.generated_tokens
    finished = roll_out(first_instance_id=10, history=log).stats
    assert finished.tokens_per_s == finished.tail_time_s == 0


def test_a_rollout_goes_on_after_any_event_at_which_its_process_dies(expected):
    """Also if the resumed one dies: its own log is of the same form."""
    log: list[Event] = []
    roll_out(ChaosConfig(kill_instance=1), log=log)
    assert any(isinstance(event, InstanceLost) for event in log)
    lines = [json.dumps(encode_event(event)) for event in log]
    for end in [0, 1, 2, 3, *range(4, len(lines), 7), len(lines)]:
        history, rest = list(decode_events(lines[:end])), []
        result = roll_out(first_instance_id=10, history=history, log=rest)
        check(result, expected)
    half = list(decode_events(lines[: len(lines) // 2]))
    rest = []
    roll_out(first_instance_id=10, history=half, log=rest)
    again = [*half, *decode_events(json.dumps(encode_event(event)) for event in rest[: len(rest) // 2])]
    check(roll_out(first_instance_id=20, history=again), expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_schedules_of_kills_and_restarts_lose_and_double_nothing(expected):
    lost = resumed = 0
    for seed in range(200):
        rng = random.Random(seed)
        policy, chaos = rng.choice(["seer", "divided"]), ChaosConfig(kill_instance=rng.randint(1, 6), seed=seed)
        log: list[Event] = []
        result = roll_out(chaos, policy=policy, instances=rng.randint(1, 3), log=log)
        check(result, expected)
        lost, resumed = lost + result.stats.instances_lost, resumed + result.stats.chunks_resumed
        history = log[: rng.randint(0, len(log))]
        check(roll_out(chaos, policy=policy, first_instance_id=100, history=history), expected)
    assert lost > 400 and resumed > 400
