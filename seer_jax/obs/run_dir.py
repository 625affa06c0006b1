"""The directory of a run: resolved configuration, metrics, checkpoints."""

from datetime import datetime
from pathlib import Path

from seer_jax.config.dump import to_yaml
from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
"""Events of one rollout, in its directory, or of a training run's iteration under way; see `core.eventlog`."""
SAMPLES_FILE = "samples.jsonl"
"""In the directory of one rollout: its responses."""


def fill_run_dir(template: str, name: str, start: datetime) -> Path:
    """Fill in `run_dir`.

    Args:
        template: `run_dir` of the configuration, with `{name}` and `{time}`.
        name: Preset or path that `--config` named; its last part without suffix is used.
        start: When the run starts.

    Returns:
        The directory; nothing is created.
    """
    return Path(template.format(name=Path(name).stem, time=f"{start:%Y%m%d-%H%M%S}")).expanduser()


def create_run_dir(path: Path, config: RunConfig, *, resume: bool) -> None:
    """Create a run's directory and save its resolved configuration there.

    Args:
        path: The directory.
        config: What the run will use, overrides included.
        resume: Whether an earlier run is continued; else the directory must be new or empty.

    Raises:
        ConfigError: If the directory holds something and `resume` is False, or it cannot be written.
    """
    if not resume and path.is_dir() and any(path.iterdir()):
        raise ConfigError("run_dir", f"{str(path)!r} is not empty", "give a new directory, or --resume it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError("run_dir", f"cannot write to {str(path)!r}: {error.strerror}", "give another one") from error
