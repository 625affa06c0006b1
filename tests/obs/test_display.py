"""What humans see: progress while a rollout runs, tables after it."""

import io

import numpy as np
import pytest
from rich.console import Console

from seer_jax.core.commands import EmitSample, IterationDone
from seer_jax.core.events import GroupsSubmitted, InstanceReport
from seer_jax.core.types import InstanceStatus, RequestId, RolloutGroup, Sample, SamplingParams
from seer_jax.obs.progress import ProgressDisplay
from seer_jax.obs.tables import format_value, print_rollouts, print_summary

TOKENS = np.array([1], np.int32)


def submitted(num_groups: int) -> GroupsSubmitted:
    groups = tuple(
        RolloutGroup(group_id=i, prompt_token_ids=TOKENS, group_size=4, sampling=SamplingParams(max_tokens=8))
        for i in range(num_groups)
    )
    return GroupsSubmitted(groups=groups, policy_version=0)


def report(instance_id: int, **counters: int) -> InstanceReport:
    status = InstanceStatus(
        instance_id=instance_id,
        num_running=3,
        num_waiting=5,
        num_free_pages=25,
        num_total_pages=100,
        num_generated_tokens=1000,
    )
    return InstanceReport(status=status)


def emitted() -> EmitSample:
    return EmitSample(
        sample=Sample(
            request_id=RequestId(0, 0),
            prompt_token_ids=TOKENS,
            token_ids=TOKENS,
            logprobs=np.zeros(1, np.float32),
            finish_reason="stop",
            policy_version=0,
            num_chunks=1,
        )
    )


def make_console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def rendered(display: ProgressDisplay) -> str:
    console = make_console(terminal=True)
    console.print(display.render())
    return console.file.getvalue()


def test_progress_shows_each_instance_and_the_whole():
    display = ProgressDisplay(enabled=False)
    display.on_event(0.0, submitted(2), [])
    display.on_event(0.5, report(1), [])
    display.on_event(1.5, report(0), [])
    display.on_event(2.0, report(1), [emitted(), emitted(), IterationDone()])
    lines = rendered(display).splitlines()
    assert lines[0] == "policy version 0: 2/8 responses, 2,000 tokens, 1,000 tokens/s"
    assert lines[2].split()[:4] == ["0", "3", "5", "75%"]
    assert lines[3].split()[:4] == ["1", "3", "5", "75%"]
    assert lines[3].split()[-1] == "500"


def test_a_new_iteration_starts_from_zero():
    display = ProgressDisplay(enabled=False)
    display.on_event(0.0, submitted(2), [])
    display.on_event(2.0, report(1), [emitted()])
    display.on_event(0.0, submitted(3), [])
    assert rendered(display).startswith("policy version 0: 0/12 responses, 0 tokens, - tokens/s")


@pytest.mark.parametrize(
    ("enabled", "terminal", "draws"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_draws_only_on_a_terminal_and_only_when_wanted(enabled, terminal, draws):
    console = make_console(terminal=terminal)
    with ProgressDisplay(enabled=enabled, console=console) as display:
        display.on_event(1.0, submitted(1), [])
    assert bool(console.file.getvalue()) == draws


def test_rollouts_stand_side_by_side_under_their_policies():
    console = make_console(terminal=False)
    runs = [{"policy": "seer", "tokens_per_s": 2000.0}, {"policy": "group_round_robin", "tokens_per_s": 1400.0}]
    print_rollouts(runs, console=console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines == [["seer", "group_round_robin"], ["tokens_per_s", "2,000", "1,400"]]


def test_a_summary_has_one_line_per_value():
    console = make_console(terminal=False)
    print_summary({"reward": 0.123456, "policy": "seer"}, title="iteration 1", console=console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines == [["iteration", "1"], ["reward", "0.1235"], ["policy", "seer"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (1234.5, "1,234"), (0.000123456, "0.0001235"), (True, "True"), ("x", "x"), (None, "None")],
)
def test_numbers_are_written_in_few_digits(value, text):
    assert format_value(value) == text
