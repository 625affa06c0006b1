"""The whole loop on a small random model: it learns, resumes exactly, and survives a reward that crashes."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax.cli.resume import next_instance_id
from seer_jax.config.schema import DataConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import Event
from seer_jax.core.scheduling import make_policy
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.models.config import DecoderConfig
from seer_jax.obs.event_file import EventFile
from seer_jax.obs.run_dir import EVENTS_FILE
from seer_jax.train.iteration_log import IterationLog
from seer_jax.train.learner import Learner
from seer_jax.train.loop import TrainingRun, restore_learner
from seer_jax.train.tasks import Prompt, RewardFunction
from tests.engine import tiny

CONFIG = RunConfig(
    data=DataConfig(heldout_prompts=8),
    sampling=SamplingConfig(max_tokens=12),
    rollout=RolloutConfig(instances=2, num_groups=4, group_size=8, chunk_size=5),
    engine=dataclasses.replace(tiny.CONFIG, deterministic=True),
    train=TrainConfig(iterations=4, learning_rate=1e-2, warmup_updates=1, checkpoint_every=2),
)


def share_of_even_tokens(response: str) -> float:
    """Reward with a dense signal."""
    return float(np.mean([ord(character) % 2 == 0 for character in response])) if response else 0.0


@dataclass(frozen=True)
class EvenTokens:
    """Prompts are random; the reward judges the response alone."""

    judge: Callable[[str], float] = share_of_even_tokens
    max_prompt_tokens: int = 8

    @property
    def reward_function(self) -> RewardFunction:
        """Judge."""
        return lambda prompt, response, record: self.judge(response)

    def make_prompts(self, seed: int, split: str, count: int, start: int = 0) -> list[Prompt]:
        """Short prompts, other ones for every split and index."""
        offset = 0 if split == "train" else 10_000
        return [
            Prompt(text="", token_ids=tiny.prompt(offset + i, 4 + i % 5), record={})
            for i in range(start, start + count)
        ]

    def check_tokenizer(self, model: DecoderConfig) -> None:
        """Any model will do."""


@dataclass
class Outcome:
    """What a run left."""

    result: dict[str, Any]
    records: list[dict[str, Any]]
    params: Any
    is_same_config: bool
    obstacle: str


class KilledError(BaseException):
    """The process dies here, as far as the files are concerned."""


def train(
    run_dir: Path,
    config: RunConfig = CONFIG,
    *,
    task: EvenTokens | None = None,
    resume: bool = False,
    dies_at: tuple[int, int] = (-1, -1),
    on_record: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Outcome:
    """Train as the command does.

    Args:
        run_dir: Where; created if missing.
        config: The run.
        task: What to learn.
        resume: Go on with what an earlier call left there.
        dies_at: The iteration, from 0, and how many of its events are logged when `KilledError` is raised.
        on_record: Called with every record.
    """
    run_dir.mkdir(exist_ok=True)
    learner = Learner(config, tiny.MODEL, tiny.params())
    records: list[dict[str, Any]] = []
    with EventFile(run_dir / EVENTS_FILE) as file:
        log = MortalLog(file, config, dies_at)
        first, is_same = restore_learner(run_dir, learner, config) if resume else (0, True)
        history, obstacle = log.find_history(first, learner.policy_version, make_driver(config))
        cluster = build_local_cluster(config, tiny.MODEL, tiny.params(), first_instance_id=next_instance_id(history))
        run = TrainingRun(
            config,
            runner=RolloutRunner(cluster, make_driver(config), history=history),
            learner=learner,
            task=task or EvenTokens(),
            run_dir=run_dir,
            log=log,
            on_record=lambda record: (records.append(dict(record)), on_record(records[-1])),
            stop_token_ids=(1,),
        )
        return Outcome(run.run(first), records, jax.device_get(learner.params), is_same, obstacle)


def make_driver(config: RunConfig) -> RolloutDriver:
    return RolloutDriver(make_policy("seer", config.rollout))


class MortalLog(IterationLog):
    """One after whose n-th event of an iteration nothing more happens."""

    def __init__(self, file: EventFile, config: RunConfig, dies_at: tuple[int, int]) -> None:
        super().__init__(file, config)
        self._dies_at, self._num_written = dies_at, 0
        self._iteration = -1

    def begin(self, iteration: int, policy_version: int) -> None:
        """See `IterationLog`."""
        super().begin(iteration, policy_version)
        self._iteration, self._num_written = iteration, 0

    def write(self, event: Event) -> None:
        """See `IterationLog`; then perhaps die."""
        super().write(event)
        self._num_written += 1
        if (self._iteration, self._num_written) == self._dies_at:
            raise KilledError


def iterations(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == "iteration"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(tmp_path_factory.mktemp("run"))


def test_reward_on_heldout_prompts_rises(outcome: Outcome) -> None:
    assert outcome.result["reward_after"] > outcome.result["reward_before"] + 0.1
    assert outcome.result["iterations"] == 4
    assert outcome.result["rollout_tokens"] == sum(r["generated_tokens"] for r in iterations(outcome.records))


def test_learner_sees_the_log_probabilities_of_the_rollout(outcome: Outcome) -> None:
    assert 0 < outcome.result["logprob_gap_mean"] < 1e-5
    assert [record["policy_version"] for record in iterations(outcome.records)] == [1, 2, 3, 4]


def test_resumed_run_ends_with_the_same_weights(outcome: Outcome, tmp_path: Path) -> None:
    half = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, iterations=2))
    train(tmp_path, half)
    resumed = train(tmp_path, resume=True)
    assert [record["iteration"] for record in iterations(resumed.records)] == [3, 4]
    assert not resumed.is_same_config  # 4 iterations, not 2
    hashes = [record["output_sha256"] for record in iterations(outcome.records)]
    assert [record["output_sha256"] for record in iterations(resumed.records)] == hashes[2:]
    for got, expected in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(outcome.params), strict=True):
        np.testing.assert_array_equal(got, expected)


def count_events(run_dir: Path) -> int:
    return (run_dir / EVENTS_FILE).read_bytes().count(b"\n") - 1


def check_same_end(resumed: Outcome, outcome: Outcome, first: int) -> None:
    """Rewards, tokens and log-probabilities (by what the learner made of them), as if nothing had happened."""
    names = ("iteration", "policy_version", "reward_mean", "output_sha256", "loss", "grad_norm", "logprob_gap_max")
    expected = iterations(outcome.records)[first:]
    assert [[r[name] for name in names] for r in iterations(resumed.records)] == [
        [r[name] for name in names] for r in expected
    ]
    for got, same in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(outcome.params), strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize(("iteration", "num_events"), [(0, 1), (2, 40)])
def test_run_that_is_killed_in_a_rollout_goes_on_inside_it(
    outcome: Outcome, tmp_path: Path, iteration: int, num_events: int
) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, dies_at=(iteration, num_events))
    with (tmp_path / EVENTS_FILE).open("a") as log:
        log.write('{"type": "ChunkFin')  # Torn, as a full disk would leave it.
    resumed = train(tmp_path, resume=True)
    check_same_end(resumed, outcome, iteration)
    assert [r["replayed_events"] for r in resumed.records if "replayed_events" in r][:3] == [0, num_events, 0]
    rest = iterations(resumed.records)[0]
    assert rest["iteration_time_s"] > rest["rollout_time_s"] > 0


def test_run_that_is_killed_twice_in_a_rollout_and_then_in_the_update_samples_nothing_twice(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, dies_at=(2, 12))
    with pytest.raises(KilledError):
        train(tmp_path, resume=True, dies_at=(-1, 20))  # The resumed rollout begins no log.
    assert count_events(tmp_path) == 12 + 20
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Learner, "update", lambda *_: (_ for _ in ()).throw(KilledError))
        train(tmp_path, resume=True)
    resumed = train(tmp_path, resume=True)
    check_same_end(resumed, outcome, 2)
    third = iterations(resumed.records)[0]
    assert third["num_steps"] == third["tokens_per_s"] == 0  # All its tokens were in the log.


def test_log_that_does_not_fit_is_not_used_and_says_why(outcome: Outcome, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, dies_at=(2, 12))

    def find(iteration: int, config: RunConfig = CONFIG, *, policy_version: int | None = None) -> tuple[int, str]:
        version = iteration if policy_version is None else policy_version
        with EventFile(tmp_path / EVENTS_FILE) as file:
            events, obstacle = IterationLog(file, config).find_history(iteration, version, make_driver(config))
        return len(events), obstacle

    assert find(2) == (12, "")
    assert find(3) == (0, "")  # Done, so nothing is lost.
    assert find(0) == (0, "the event log is of iteration 3 and policy version 2, the checkpoint has policy version 0")
    assert find(2, policy_version=1)[1].endswith("the checkpoint has policy version 1")
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, iterations=9, learning_rate=1e-3))
    assert find(2, longer) == (12, "")
    hotter = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, temperature=0.5))
    assert find(2, hotter) == (0, "sampling.temperature was 1.0 when the rollout began, not 0.5")
    log = tmp_path / EVENTS_FILE
    lines = log.read_text().splitlines(keepends=True)
    for broken in ([*lines, '{"type": "Unheard"}\n'], [*lines, lines[1]], lines[1:], ["[]\n"], ["{\n"]):
        log.write_text("".join(broken))
        num_events, obstacle = find(2)
        assert num_events == 0 and "cannot be read by this version" in obstacle
    resumed = train(tmp_path, resume=True)
    assert "cannot be read" in resumed.obstacle
    check_same_end(resumed, outcome, 2)


def test_crash_of_the_reward_function_costs_its_samples_only(tmp_path: Path) -> None:
    def judge(response: str) -> float:
        if "?" in response:
            raise ZeroDivisionError("no question marks, please")
        return share_of_even_tokens(response)

    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, iterations=1))
    outcome = train(tmp_path, config, task=EvenTokens(judge))
    (record,) = iterations(outcome.records)
    assert 0 < record["num_reward_failures"] < 32
    assert "no question marks" in record["reward_failures"][0] and "sample (" in record["reward_failures"][0]
    assert np.isfinite(record["reward_mean"]) and np.isfinite(record["grad_norm"]) and record["num_requests"] == 32


def test_interrupted_run_keeps_its_finished_iterations(tmp_path: Path) -> None:
    seen = 0

    def judge(response: str) -> float:
        nonlocal seen
        seen += 1
        if seen > 8 + 3 * 32:
            raise KeyboardInterrupt
        return share_of_even_tokens(response)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, task=EvenTokens(judge))
    resumed = train(tmp_path, resume=True)
    assert [record["iteration"] for record in iterations(resumed.records)] == [4]


@pytest.mark.parametrize("last", [1, 3])
def test_run_that_is_interrupted_after_an_update_saves_it_under_its_own_number(
    outcome: Outcome, tmp_path: Path, last: int
) -> None:
    """It goes on after that update, neither from weights of a later iteration nor with one of them twice."""

    def interrupt(record: dict[str, Any]) -> None:
        if record["kind"] == "iteration" and record["iteration"] == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_record=interrupt)
    check_same_end(train(tmp_path, resume=True), outcome, last)


def test_run_that_is_interrupted_in_an_update_keeps_the_checkpoint_before(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner._update_once

    def interrupted(learner: Learner, *batch: Any) -> dict[str, float]:
        metrics = update(learner, *batch)
        if learner.policy_version == 3:
            raise KeyboardInterrupt  # The weights are new, their version is not.
        return metrics

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "_update_once", interrupted)
        train(tmp_path)
    check_same_end(train(tmp_path, resume=True), outcome, 2)


def test_resume_of_a_finished_run_says_how_to_go_on(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, iterations=1))
    train(tmp_path, config)
    with pytest.raises(ConfigError, match=r"train.iterations: is 1, 1 are done"):
        train(tmp_path, config, resume=True)
