"""What the verbs run: loads the model, starts the instances, runs the job, stops the instances."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from seer_jax.cli.options import RolloutOptions, TrainOptions
from seer_jax.cli.resume import next_instance_id, read_rollout, restore_training
from seer_jax.config.presets import resolve_preset_path
from seer_jax.config.schema import KVPoolConfig, RunConfig
from seer_jax.core.commands import Command
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import Event
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.core.scheduling import make_estimator, make_policy, switched_on
from seer_jax.core.types import RolloutGroup, Sample
from seer_jax.engine.cluster import Cluster
from seer_jax.engine.factory import build_engine, build_local_cluster, enable_compilation_cache, needs_truncation
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.engine.step_times import measure_step_times
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, decoder_specs
from seer_jax.obs.event_file import EventFile
from seer_jax.obs.metrics import MetricsWriter
from seer_jax.obs.progress import ProgressDisplay
from seer_jax.obs.run_dir import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, create_run_dir
from seer_jax.obs.tables import print_summary
from seer_jax.obs.trace import RolloutRecorder, write_trace
from seer_jax.sharding import check_divisible
from seer_jax.train.checks import check_task, stop_token_ids
from seer_jax.train.iteration_log import IterationLog
from seer_jax.train.learner import Learner
from seer_jax.train.loop import TrainingRun, describe_lengths, make_groups, make_sampling
from seer_jax.train.tasks import Task, make_task
from seer_jax.train.tokenizer import decode
from seer_jax.weights.checkpoint import load_checkpoint, load_config, save_checkpoint

EXPERT_IDS_FILE = "expert_ids.npz"
"""Beside the samples, with `engine.expert_ids`: an array `<group id>-<index>` for each (`core.types.Sample`)."""
MODEL_DIRECTORY = "model"
PROFILE_REPEATS = 50
"""Runs of every program of which `seer-jax profile` takes the fastest."""

TABLE_FIELDS = (
    "iteration", "reward_mean", "groups_with_signal", "num_reward_failures", "length_mean", "length_max",
    "length_group_correlation", "rollout_time_s", "tail_time_s", "tokens_per_s", "num_chunks", "max_kv_utilization",
    "learner_time_s", "logprob_gap_mean", "grad_norm", "clip_fraction", "weights_update_s", "iteration_time_s",
)  # fmt: skip
"""Fields of an iteration's record that its table shows."""


def train(config: RunConfig, options: TrainOptions) -> dict[str, Any]:
    """Train by GRPO; leaves metrics, checkpoints and the final model in `options.run_dir`.

    Returns:
        See `TrainingRun.run`, and `wall_s`: everything from loading the model to writing it.

    Raises:
        SeerError: Bad input, before anything heavy starts, or a run that failed.
    """
    started = time.perf_counter()
    task, model_config, params = _load(config)
    _check_learner_devices(config)
    enable_compilation_cache(config.engine.compilation_cache_dir)
    learner = Learner(config, model_config, params)
    with ExitStack() as stack:
        if not options.resume:
            create_run_dir(options.run_dir, config, resume=False)
        log = IterationLog(stack.enter_context(EventFile(options.run_dir / EVENTS_FILE)), config)
        first, history = 0, []
        if options.resume:
            driver = _make_driver(config.rollout.policy, config)
            first, history = restore_training(options.run_dir, config, learner, log, driver)
        metrics = stack.enter_context(MetricsWriter(options.run_dir / METRICS_FILE))
        display = stack.enter_context(ProgressDisplay(enabled=not options.json))
        cluster = stack.enter_context(
            _open_cluster(config, model_config, params, first_instance_id=next_instance_id(history))
        )

        def on_record(record: Mapping[str, Any]) -> None:
            metrics.write(record)
            _print_record(record, quiet=options.json)

        run = TrainingRun(
            config,
            runner=RolloutRunner(
                cluster,
                _make_driver(config.rollout.policy, config),
                on_event=display.on_event,
                chaos=config.chaos,
                history=history,
            ),
            learner=learner,
            task=task,
            run_dir=options.run_dir,
            log=log,
            on_record=on_record,
            stop_token_ids=stop_token_ids(config, model_config),
        )
        result = run.run(first)
        save_checkpoint(options.run_dir / MODEL_DIRECTORY, model_config, learner.params)
    return result | {"wall_s": time.perf_counter() - started}


def rollout(config: RunConfig, options: RolloutOptions) -> list[dict[str, Any]]:
    """Roll out the task's first prompts once per variant; those in a row with the same speculation share instances.

    Each rollout leaves its samples and its event log in a directory of its own under `options.run_dir`.

    Returns:
        Figures of each rollout, see `RolloutStats`; `fired_...` counts the decisions that an option changed.

    Raises:
        SeerError: Bad input, before anything heavy starts, or a run that failed.
    """
    task, model_config, params = _load(config)
    prompts = dict(enumerate(task.make_prompts(config.seed, "train", config.rollout.num_groups)))
    sampling = make_sampling(config, stop_token_ids(config, model_config))
    groups = make_groups(prompts, config.rollout.group_size, sampling, iteration=0)
    history = read_rollout(options.run_dir, config) if options.resume else []
    create_run_dir(options.run_dir, config, resume=options.resume)
    directories = [options.run_dir / f"{index}-{policy}" for index, (policy, _) in enumerate(options.variants)]
    for directory in directories:
        directory.mkdir(exist_ok=options.resume)
    runs: list[dict[str, Any]] = []
    recorders: list[RolloutRecorder] = []
    with MetricsWriter(options.run_dir / METRICS_FILE) as metrics, ProgressDisplay(enabled=not options.json) as display:
        for mode, variants in groupby(enumerate(options.variants), key=lambda variant: variant[1][1]):
            speculation = replace(config.speculation, mode=mode)
            with _open_cluster(
                replace(config, speculation=speculation),
                model_config,
                params,
                first_instance_id=next_instance_id(history),
            ) as cluster:
                _warm_up(cluster, config, groups)
                for index, (policy, _) in variants:
                    driver = _make_driver(policy, config)
                    watchers = [display.on_event]
                    if options.trace is not None:
                        prefix = f"{index} {policy}:{mode} " if len(options.variants) > 1 else ""
                        recorders.append(RolloutRecorder(prefix))
                        watchers.append(recorders[-1].on_event)
                    runner = RolloutRunner(
                        cluster, driver, on_event=_tell_all(watchers), chaos=config.chaos, history=history
                    )
                    with EventFile(directories[index] / EVENTS_FILE) as log:
                        result = runner.run(groups, log=log.write)
                    lengths = describe_lengths(result.samples, config.sampling.max_tokens)
                    fired = {f"fired_{name}": driver.firings[name] for name in switched_on(config.rollout)}
                    runs.append({"policy": policy, "speculation": mode, **asdict(result.stats), **lengths, **fired})
                    metrics.write({"kind": "rollout", **runs[-1]})
                    _write_samples(directories[index] / SAMPLES_FILE, result.samples)
    if options.trace is not None:
        spans = [span for recorder in recorders for span in recorder.spans]
        write_trace(options.trace, spans, [counter for recorder in recorders for counter in recorder.counters()])
    return runs


def profile(config: RunConfig) -> MeasuredStepTimes:
    """Time the step programs of one instance in this process.

    Args:
        config: The run; its `speculation.mode` is not "off".

    Raises:
        SeerError: Bad input, or an engine that cannot be built.
    """
    cores = os.sched_getaffinity(0)
    try:
        if config.rollout.runtime == "ray":
            from seer_jax.distributed.instance_actor import share_of_cores

            # An instance on a CPU has no more; before XLA starts and sizes its threads.
            os.sched_setaffinity(0, share_of_cores(0, config.rollout.instances))
            if jax.default_backend() != "cpu":
                os.sched_setaffinity(0, cores)
        _, model_config, params = _load(config)
        # A shared pool would be empty here, and need not be running.
        unmeasured = replace(config, speculation=replace(config.speculation, budget="fixed"), kvpool=KVPoolConfig())
        engine = build_engine(unmeasured, model_config, params, instance_id=0)
        return measure_step_times(engine.programs(truncates=needs_truncation(config)), repeats=PROFILE_REPEATS)
    finally:
        os.sched_setaffinity(0, cores)


def _make_driver(policy: str, config: RunConfig) -> RolloutDriver:
    """A driver with the policy and, as the configuration says, its estimator."""
    return RolloutDriver(make_policy(policy, config.rollout), make_estimator(policy, config.rollout))


def _warm_up(cluster: Cluster, config: RunConfig, groups: Sequence[RolloutGroup]) -> None:
    """Roll out a few short groups per instance, untimed: the first messages and copies of a fresh cluster are slow."""
    sampling = groups[0].sampling
    short = replace(sampling, max_tokens=min(sampling.max_tokens, 2 * config.rollout.chunk_size))
    warmup = [replace(group, sampling=short) for group in groups[: 4 * config.rollout.instances]]
    RolloutRunner(cluster, _make_driver("seer", config)).run(warmup)


def _tell_all(
    watchers: Sequence[Callable[[float, Event, Sequence[Command]], None]],
) -> Callable[[float, Event, Sequence[Command]], None]:
    """One `on_event` for several."""

    def on_event(elapsed_s: float, event: Event, commands: Sequence[Command]) -> None:
        for watch in watchers:
            watch(elapsed_s, event, commands)

    return on_event


def _write_samples(file: Path, samples: list[Sample]) -> None:
    """One JSON object a line: prompt and response as text and tokens; expert ids, if any, in a file beside.

    The samples' file appears last and whole: a rollout that has it has ended.
    """
    experts = {f"{s.request_id.group_id}-{s.request_id.index}": s.expert_ids for s in samples}
    if all(ids is not None for ids in experts.values()):
        np.savez_compressed(file.with_name(EXPERT_IDS_FILE), **experts)
    unfinished = file.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)
    with MetricsWriter(unfinished) as writer:
        for sample in samples:
            writer.write(
                {
                    "group_id": sample.request_id.group_id,
                    "index": sample.request_id.index,
                    "prompt": decode(sample.prompt_token_ids),
                    "response": decode(sample.token_ids),
                    "finish_reason": sample.finish_reason,
                    "num_chunks": sample.num_chunks,
                    "prompt_token_ids": sample.prompt_token_ids.tolist(),
                    "token_ids": sample.token_ids.tolist(),
                    "logprobs": sample.logprobs.tolist(),
                }
            )
    unfinished.replace(file)


def _load(config: RunConfig) -> tuple[Task, DecoderConfig, Params]:
    """Load task and model, after checking all that can be checked of them without weights or devices."""
    task, path, dtype = make_task(config.data), resolve_preset_path(config.model.path), jnp.dtype(config.model.dtype)
    model_config = load_config(path)
    check_task(task, config, model_config)
    check_divisible(config.sharding, decoder_specs(model_config, dtype))
    _, params = load_checkpoint(path, dtype, keeps_float8_experts=config.model.expert_dtype == "checkpoint")
    return task, model_config, jax.device_get(params)


def _check_learner_devices(config: RunConfig) -> None:
    """The learner computes in this process; actors on the same accelerators would find their memory taken."""
    if config.rollout.runtime == "ray" and jax.default_backend() != "cpu":
        raise ConfigError(
            "rollout.runtime",
            f"training with 'ray' would share this machine's {jax.default_backend()}s between learner and instances",
            "use --runtime local",
        )


@contextmanager
def _open_cluster(
    config: RunConfig, model_config: DecoderConfig, params: Params, first_instance_id: int = 0
) -> Iterator[Cluster]:
    start: Callable[..., Cluster]
    if config.rollout.runtime == "ray":
        from seer_jax.distributed.ray_cluster import RayCluster as start
    else:
        start = build_local_cluster
    if config.speculation.profile is not None:  # Actors have a working directory of their own.
        profile_path = str(Path(config.speculation.profile).expanduser().resolve())
        config = replace(config, speculation=replace(config.speculation, profile=profile_path))
    if config.kvpool.directory is not None:
        pool_path = str(Path(config.kvpool.directory).expanduser().resolve())
        config = replace(config, kvpool=replace(config.kvpool, directory=pool_path))
    cluster = start(config, model_config, params, first_instance_id=first_instance_id)
    try:
        yield cluster
    finally:
        cluster.close()


def _print_record(record: Mapping[str, Any], *, quiet: bool) -> None:
    """Show a record: a table for people, one line on stderr beside machine-readable output."""
    for failure in record.get("reward_failures", [])[:1]:
        print(f"{record['num_reward_failures']} rewards failed; {failure}", file=sys.stderr)
    if quiet:
        print(f"{record['kind']} {record['iteration']}: reward {record['reward_mean']:.3f}", file=sys.stderr)
        return
    shown = {name: record[name] for name in TABLE_FIELDS if name in record}
    print_summary(shown, title=f"{record['kind']} {record['iteration']}", console=Console())
