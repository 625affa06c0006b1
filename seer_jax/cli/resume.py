"""What a run that died has left, for `--resume`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from seer_jax.config.presets import load_config
from seer_jax.config.schema import RunConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.eventlog import decode_events
from seer_jax.core.events import Event, InstanceJoined
from seer_jax.obs.event_file import EventFile, describe_settings, find_change
from seer_jax.obs.metrics import truncate_metrics
from seer_jax.obs.run_dir import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, create_run_dir
from seer_jax.train.iteration_log import IterationLog
from seer_jax.train.learner import Learner
from seer_jax.train.loop import restore_learner


def read_rollout(run_dir: Path, config: RunConfig) -> list[Event]:
    """Events of the one rollout in a directory; what its process was writing when it died is cut off.

    Raises:
        ConfigError: If it has ended or still runs, is one of several, or was of settings that mean other tokens.
    """
    if len(list(run_dir.glob("[0-9]*-*"))) > 1:
        raise ConfigError("resume", f"{str(run_dir)!r} holds several rollouts", "start them anew, without --resume")
    before = load_config(str(run_dir / CONFIG_FILE))
    if (change := find_change(describe_settings(before), config)) is not None:
        raise ConfigError(*change, "leave it out")
    directory = run_dir / f"0-{config.rollout.policy}"
    if (directory / SAMPLES_FILE).exists():
        raise ConfigError("resume", f"the rollout in {str(run_dir)!r} is finished", f"its responses: {SAMPLES_FILE}")
    log = directory / EVENTS_FILE
    if not log.exists():
        return []
    with EventFile(log) as file:
        return list(decode_events(file.read()))


def restore_training(
    run_dir: Path, config: RunConfig, learner: Learner, log: IterationLog, driver: RolloutDriver
) -> tuple[int, list[Event]]:
    """Put a training run where it stopped; says on stderr what of it is done again.

    Args:
        run_dir: Directory of the run.
        config: What it goes on with; saved there.
        learner: Gets the last checkpoint's state.
        log: The run's.
        driver: A fresh one; it is used up.

    Returns:
        Iterations that are done, and the events of the next one so far.

    Raises:
        ConfigError: See `restore_learner`.
    """
    first, is_same_config = restore_learner(run_dir, learner, config)
    if not is_same_config:
        print(f"seer-jax: {run_dir} goes on with settings other than it was started with", file=sys.stderr)
    history, obstacle = log.find_history(first, learner.policy_version, driver)
    if history:
        print(f"seer-jax: iteration {first + 1} goes on inside its rollout, {len(history)} events in", file=sys.stderr)
    elif obstacle:
        print(f"seer-jax: the interrupted rollout begins anew: {obstacle}", file=sys.stderr)
    truncate_metrics(run_dir / METRICS_FILE, first)
    create_run_dir(run_dir, config, resume=True)
    return first, history


def next_instance_id(history: Sequence[Event]) -> int:
    """The first id that no instance of a history has had."""
    return 1 + max((event.info.instance_id for event in history if isinstance(event, InstanceJoined)), default=-1)
