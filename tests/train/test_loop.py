"""The whole loop on a small random model: it learns, resumes exactly, and survives a reward that crashes."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax.config.schema import DataConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.scheduling import make_policy
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.models.config import DecoderConfig
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


def train(
    run_dir: Path, config: RunConfig = CONFIG, *, task: EvenTokens | None = None, resume: bool = False
) -> Outcome:
    cluster = build_local_cluster(config, tiny.MODEL, tiny.params())
    learner = Learner(config, tiny.MODEL, tiny.params())
    records: list[dict[str, Any]] = []
    run = TrainingRun(
        config,
        runner=RolloutRunner(cluster, RolloutDriver(make_policy("seer", config.rollout))),
        learner=learner,
        task=task or EvenTokens(),
        run_dir=run_dir,
        on_record=lambda record: records.append(dict(record)),
        stop_token_ids=(1,),
    )
    first, is_same = restore_learner(run_dir, learner, config) if resume else (0, True)
    return Outcome(run.run(first), records, jax.device_get(learner.params), is_same)


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


def test_resume_of_a_finished_run_says_how_to_go_on(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, iterations=1))
    train(tmp_path, config)
    with pytest.raises(ConfigError, match=r"train.iterations: is 1, 1 are done"):
        train(tmp_path, config, resume=True)
