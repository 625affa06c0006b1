"""Real rollouts again: the driver over the recorded events, and a simulation that predicts how long they took."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seer_jax.config.presets import load_config
from seer_jax.config.schema import RunConfig
from seer_jax.core.commands import EmitSample
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError, ProtocolError
from seer_jax.core.eventlog import decode_event, replay
from seer_jax.core.events import Event, GroupsSubmitted, InstanceJoined, InstanceLost
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.core.scheduling import make_estimator, make_policy
from seer_jax.core.types import InstanceInfo, RequestId, Sample, output_sha256
from seer_jax.obs.run_dir import CONFIG_FILE, EVENTS_FILE, METRICS_FILE
from seer_jax.sim.simulation import SimCluster, SimRequests, Simulation


@dataclass(frozen=True)
class ProfiledTimes:
    """Measured step times as a simulated instance asks for them.

    Prefill is taken to cost what tokens cost in the largest verification program, which computes as many at once.

    Attributes:
        measured: Of `seer-jax profile`, on the machine and with the engine of the rollout.
    """

    measured: MeasuredStepTimes

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        """See `StepTimeModel`."""
        return self.measured.plain_step_s(num_seqs, mean_context)

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        """See `StepTimeModel`."""
        return self.measured.verify_step_s(num_seqs, num_tokens, mean_context)

    def prefill_s(self, num_tokens: int, start: int = 0) -> float:
        """See `InstanceTimes`."""
        largest = self.measured.verify_sizes[-1]
        context = start + num_tokens / 2
        return num_tokens * float(self.measured.verify_step_s(1, largest, context)) / largest


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A rollout as it was and as it is simulated; seconds.

    Attributes:
        name: Directory of the rollout.
        policy: Scheduling policy.
        replayed_events: Events that the driver took again; it sent the same chunks to the same instances, and the
            responses have the recorded hash.
        rollout_time_s: Measured.
        predicted_rollout_time_s: Simulated.
        tail_time_s: Measured.
        predicted_tail_time_s: Simulated.
        num_preemptions: Measured.
        predicted_preemptions: Simulated.
    """

    name: str
    policy: str
    replayed_events: int
    rollout_time_s: float
    predicted_rollout_time_s: float
    tail_time_s: float
    predicted_tail_time_s: float
    num_preemptions: int
    predicted_preemptions: int

    def to_json(self) -> dict[str, Any]:
        """All fields, and the errors: of the rollout's time as a share of it, and of the tail's as the same share."""
        return asdict(self) | {
            "rollout_time_error": self.predicted_rollout_time_s / self.rollout_time_s - 1,
            "tail_time_error_of_rollout": (self.predicted_tail_time_s - self.tail_time_s) / self.rollout_time_s,
        }


def predict(run_dir: Path, times: MeasuredStepTimes) -> list[Prediction]:
    """Replay every rollout of a run of `seer-jax rollout`, then simulate it.

    Args:
        run_dir: Its directory.
        times: Measured with the run's engine.

    Raises:
        ConfigError: If it is no such run, or one with speculation, whose acceptance a profile does not tell.
        ProtocolError: If the driver decides otherwise than it did: the run is of another version of seer_jax.
    """
    config, measured = _read_run(run_dir)
    predictions = []
    for number, figures in enumerate(measured):
        policy, name = figures["policy"], f"{number}-{figures['policy']}"
        if figures["speculation"] != "off":
            raise ConfigError(
                "replay", f"{name} of {run_dir} ran with speculation {figures['speculation']}", "run it off"
            )
        events = _read_events(run_dir / name / EVENTS_FILE)
        if any(isinstance(event, InstanceLost) for event in events):
            raise ConfigError("replay", f"{name} of {run_dir} lost an instance", "a run in which all instances live")
        samples = _replay(events, policy, config, figures["output_sha256"], name)
        infos, requests, true_lengths = _requests(events, samples)
        settings = config.rollout
        result = Simulation(
            cluster=SimCluster(infos=infos, times=ProfiledTimes(times)),
            requests=requests,
            policy=make_policy(policy, settings, true_lengths),
            estimator=make_estimator(policy, settings, true_lengths),
        ).run()
        predictions.append(
            Prediction(
                name=name,
                policy=policy,
                replayed_events=len(events),
                rollout_time_s=figures["rollout_time_s"],
                predicted_rollout_time_s=result.rollout_time_s,
                tail_time_s=figures["tail_time_s"],
                predicted_tail_time_s=result.tail_time_s,
                num_preemptions=figures["num_preemptions"],
                predicted_preemptions=result.counters.num_preemptions,
            )
        )
    return predictions


def _read_run(run_dir: Path) -> tuple[RunConfig, list[dict[str, Any]]]:
    metrics, config = run_dir / METRICS_FILE, run_dir / CONFIG_FILE
    if not metrics.is_file() or not config.is_file():
        raise ConfigError(
            "run", f"{str(run_dir)!r} has no {METRICS_FILE} and {CONFIG_FILE}", "a directory of `rollout`"
        )
    records = _read_json_lines(metrics)
    measured = [record for record in records if record.get("kind") == "rollout"]
    if not measured or not all("policy" in record for record in measured):
        raise ConfigError("replay", f"{str(run_dir)!r} holds no finished rollout", "a run of `seer-jax rollout`")
    return load_config(str(config)), measured


def _read_events(file: Path) -> list[Event]:
    if not file.is_file():
        raise ConfigError("replay", f"there is no {str(file)!r}", "a directory that `seer-jax rollout` wrote")
    return [decode_event(record) for record in _read_json_lines(file)]


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ConfigError("replay", f"line {number} of {file} is no JSON: {error}", "a run that ended") from error
    return records


def _replay(events: Sequence[Event], policy: str, config: RunConfig, sha256: str, name: str) -> list[Sample]:
    """Feed a fresh driver; it raises at a result of a chunk that it did not send there."""
    driver = RolloutDriver(make_policy(policy, config.rollout), make_estimator(policy, config.rollout))
    samples = [command.sample for command in replay(events, driver) if isinstance(command, EmitSample)]
    if output_sha256(samples) != sha256:
        raise ProtocolError(f"{name}: the replayed responses hash to {output_sha256(samples)}, recorded is {sha256}")
    return samples


def _requests(
    events: Sequence[Event], samples: Sequence[Sample]
) -> tuple[tuple[InstanceInfo, ...], SimRequests, dict[RequestId, int]]:
    """Instances and requests of a recorded rollout; groups are numbered in the order of submission."""
    infos = tuple(event.info for event in events if isinstance(event, InstanceJoined))
    groups = next(event.groups for event in events if isinstance(event, GroupsSubmitted))
    numbers = {group.group_id: number for number, group in enumerate(groups)}
    lengths = np.zeros((len(groups), max(group.group_size for group in groups)), np.int64)
    for sample in samples:
        lengths[numbers[sample.request_id.group_id], sample.request_id.index] = len(sample.token_ids)
    requests = SimRequests(
        lengths=lengths,
        prompts=np.array([len(group.prompt_token_ids) for group in groups]),
        limits=np.array([group.sampling.max_tokens for group in groups]),
    )
    # Ids of instances are their places in the simulated cluster.
    infos = tuple(replace(info, instance_id=number) for number, info in enumerate(infos))
    true_lengths = {RequestId(g, i): int(n) for g, row in enumerate(lengths) for i, n in enumerate(row)}
    return infos, requests, true_lengths
