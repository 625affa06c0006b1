"""The main job: rollout, reward, update, weights to the instances; strictly in this order."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager

from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import Event
from seer_jax.core.types import RolloutGroup, Sample, SamplingParams
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from seer_jax.train.advantages import group_advantages
from seer_jax.train.checkpoints import (
    CheckpointInfo,
    hash_config,
    open_checkpoints,
    restore_latest,
    save_checkpoint,
)
from seer_jax.train.iteration_log import IterationLog
from seer_jax.train.learner import Learner
from seer_jax.train.rewards import RewardFailure, compute_rewards
from seer_jax.train.tasks import Prompt, Task, length_statistics

MAX_LOGGED_FAILURES = 4
"""Tracebacks of failed reward functions kept per iteration; their number is always logged."""


class TrainingRun:
    """One GRPO run over a task.

    Args:
        config: The run.
        runner: Instances with their driver; if it has a history, then that of iteration `first` of `run`.
        learner: Holds the weights.
        task: Prompts and rewards.
        run_dir: Where checkpoints go.
        log: Takes the events of the iteration under way.
        on_record: Called with every metrics record: `{"kind": "eval" | "iteration", ...}`.
        stop_token_ids: Tokens that end a response.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        runner: RolloutRunner,
        learner: Learner,
        task: Task,
        run_dir: Path,
        log: IterationLog,
        on_record: Callable[[Mapping[str, Any]], None],
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self._config, self._runner, self._learner, self._task = config, runner, learner, task
        self._run_dir, self._on_record, self._stop_token_ids = run_dir, on_record, stop_token_ids
        self._log, self._num_updates = log, 0

    def run(self, first: int = 0) -> dict[str, Any]:
        """Train.

        Ctrl-C saves the iterations whose update is finished, unless it falls into the learner's update or a save. If it
        comes right after the update, that iteration has no record.

        Args:
            first: Iterations that are done already, see `restore_learner`.

        Returns:
            `reward_before` and `reward_after` on held-out prompts, `iterations`, `rollout_tokens`, `logprob_gap_mean`,
            of the part that was run now.
        """
        # Before the evaluation, since its history starts with a driver that has done nothing.
        resumed = self._respond(first) if self._runner.is_resuming else None
        reward_before = self._evaluate(first)
        records: list[dict[str, Any]] = []
        train, version = self._config.train, self._learner.policy_version
        with open_checkpoints(self._run_dir, train.keep_checkpoints) as checkpoints:
            for iteration in range(first, train.iterations):
                try:
                    responses, resumed = resumed or self._respond(iteration), None
                    records.append(self._learn(iteration, *responses))
                except KeyboardInterrupt:
                    num_done = self._learner.policy_version - version
                    if 0 < num_done == self._num_updates:  # Else an update has changed part of the state, perhaps.
                        self._save(checkpoints, first + num_done)
                    raise
                done = iteration + 1
                if done % train.checkpoint_every == 0 or done == train.iterations:
                    self._save(checkpoints, done)
        return {
            "reward_before": reward_before,
            "reward_after": self._evaluate(train.iterations),
            "iterations": len(records),
            "rollout_tokens": sum(record["generated_tokens"] for record in records),
            "logprob_gap_mean": float(np.mean([record["logprob_gap_mean"] for record in records])),
        }

    def _respond(self, iteration: int) -> tuple[dict[int, Prompt], RolloutResult]:
        """Roll out an iteration, or the rest of one; returns its prompts by group, and the responses."""
        config = self._config
        first_prompt = iteration * config.rollout.num_groups
        prompts = self._task.make_prompts(config.seed, "train", config.rollout.num_groups, first_prompt)
        by_group = dict(enumerate(prompts, start=first_prompt))
        if not self._runner.is_resuming:
            self._log.begin(iteration, self._learner.policy_version)
        return by_group, self._rollout(by_group, config.rollout.group_size, iteration, log=self._log.write)

    def _learn(self, iteration: int, by_group: Mapping[int, Prompt], result: RolloutResult) -> dict[str, Any]:
        """Judge an iteration's responses and update the weights; returns its record."""
        config = self._config
        judging = time.perf_counter()
        rewards, failures = compute_rewards(self._task, by_group, result.samples, config.train.reward_timeout_s)
        group_ids = np.array([sample.request_id.group_id for sample in result.samples])
        advantages = group_advantages(rewards, group_ids, config.train.loss)
        judged = time.perf_counter()
        self._num_updates += 1
        learned = self._learner.update(result.samples, advantages)
        record = {
            "kind": "iteration",
            "iteration": iteration + 1,
            "policy_version": self._learner.policy_version,
            "reward_mean": _mean_reward(rewards),
            "groups_with_signal": int(np.count_nonzero(np.add.reduceat(np.abs(advantages.values), _starts(group_ids)))),
            **describe_lengths(result.samples, config.sampling.max_tokens),
            **_describe_failures(failures),
            **asdict(result.stats),
            **learned,
            "weights_update_s": result.weights_update_s,
            "reward_time_s": judged - judging,
            "iteration_time_s": result.weights_update_s + result.stats.rollout_time_s + time.perf_counter() - judging,
        }
        self._on_record(record)
        return record

    def _evaluate(self, iteration: int) -> float:
        """Mean reward on the held-out prompts with the current weights; the same noise every time."""
        prompts = self._task.make_prompts(self._config.seed, "heldout", self._config.data.heldout_prompts)
        by_group = {-1 - i: prompt for i, prompt in enumerate(prompts)}  # training's group ids count from 0
        result = self._rollout(by_group, self._config.train.eval_samples, 0)
        timeout_s = self._config.train.reward_timeout_s
        rewards, failures = compute_rewards(self._task, by_group, result.samples, timeout_s)
        reward = _mean_reward(rewards)
        self._on_record(
            {
                "kind": "eval",
                "iteration": iteration,
                "policy_version": self._learner.policy_version,
                "reward_mean": reward,
                **_describe_failures(failures),
                **asdict(result.stats),
            }
        )
        return reward

    def _rollout(
        self,
        prompts: Mapping[int, Prompt],
        group_size: int,
        iteration: int,
        log: Callable[[Event], None] | None = None,
    ) -> RolloutResult:
        sampling = make_sampling(self._config, self._stop_token_ids)
        return self._runner.run(
            make_groups(prompts, group_size, sampling, iteration),
            policy_version=self._learner.policy_version,
            get_params=lambda: jax.device_get(self._learner.params),
            log=log,
        )

    def _save(self, checkpoints: CheckpointManager, iteration: int) -> None:
        info = CheckpointInfo(iteration=iteration, seed=self._config.seed, config_sha256=hash_config(self._config))
        save_checkpoint(checkpoints, self._learner.state, info)


def restore_learner(run_dir: Path, learner: Learner, config: RunConfig) -> tuple[int, bool]:
    """Put a learner where an earlier run stopped.

    Returns:
        Iterations that are done; 0 if the run has no checkpoint yet. And whether the run was started with this very
        configuration.

    Raises:
        ConfigError: If the checkpoint does not fit, or the run is already longer than `train.iterations`.
    """
    restored = restore_latest(run_dir, learner.state)
    if restored is None:
        return 0, True
    state, info = restored
    if info.iteration >= config.train.iterations:
        hint = f"give more than {info.iteration} to go on"
        raise ConfigError("train.iterations", f"is {config.train.iterations}, {info.iteration} are done", hint)
    learner.state = state
    return info.iteration, info.config_sha256 == hash_config(config)


def describe_lengths(samples: Sequence[Sample], max_tokens: int) -> dict[str, float]:
    """Statistics of response lengths for a record.

    Args:
        samples: Whole groups of equal size, ordered by request.
        max_tokens: The generation limit.
    """
    lengths = np.array([len(sample.token_ids) for sample in samples])
    num_groups = len({sample.request_id.group_id for sample in samples})
    statistics = length_statistics(lengths.reshape(num_groups, -1), max_tokens)
    return {
        "length_mean": statistics.mean,
        "length_max": int(lengths.max()),
        "length_limit_over_mean": statistics.limit_over_mean,
        "length_group_correlation": statistics.group_correlation,
    }


def make_sampling(config: RunConfig, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """Sampling parameters of a run."""
    sampling = config.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=stop_token_ids,
        seed=config.seed,
    )


def make_groups(
    prompts: Mapping[int, Prompt], group_size: int, sampling: SamplingParams, iteration: int
) -> list[RolloutGroup]:
    """Rollout groups of prompts that are keyed by group id."""
    return [
        RolloutGroup(
            group_id=group_id,
            prompt_token_ids=prompt.token_ids,
            group_size=group_size,
            sampling=sampling,
            iteration=iteration,
        )
        for group_id, prompt in prompts.items()
    ]


def _mean_reward(rewards: np.ndarray) -> float:
    known = rewards[~np.isnan(rewards)]
    return float(known.mean()) if len(known) else float("nan")


def _starts(group_ids: np.ndarray) -> np.ndarray:
    """First index of each run of equal ids."""
    return np.flatnonzero(np.diff(group_ids, prepend=group_ids[0] - 1))


def _describe_failures(failures: Sequence[RewardFailure]) -> dict[str, Any]:
    described = [f"sample {tuple(failure.request_id)}: {failure.error}" for failure in failures[:MAX_LOGGED_FAILURES]]
    return {"num_reward_failures": len(failures)} | ({"reward_failures": described} if described else {})
