"""The event log as a file, by which a rollout goes on after its process died."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from seer_jax.config.decode import iterate_settings
from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError
from seer_jax.core.eventlog import encode_event
from seer_jax.core.events import Event
from seer_jax.obs.metrics import to_json_line

CHANGEABLE = (
    "rollout.instances", "rollout.min_instances", "rollout.runtime", "rollout.instance_timeout_s",
    "rollout.max_replacements", "kvpool.", "chaos.", "run_dir",
)  # fmt: skip
"""Settings, or how they begin, that a resumed rollout may have otherwise than it began with."""


class EventFile:
    """An event log on disk, held by one process at a time. Use it as a context manager.

    Every line is flushed, so that an event is in the file before anything follows from it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, keeping what it holds, or create it; while this process lives, nobody else resumes it.

        Raises:
            ConfigError: If another process holds it.
        """
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError("resume", f"the run that writes {str(path)!r} has not ended", "wait for it") from error

    def read(self) -> list[str]:
        """Read all lines; what a process was writing when it died is cut off."""
        self._file.seek(0)
        whole = self._file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        return whole.decode().split("\n")[:-1]

    def write(self, event: Event) -> None:
        """Append an event."""
        self._write_line(encode_event(event))

    def begin(self, header: Mapping[str, Any]) -> None:
        """Drop all that is there and write a first line.

        Args:
            header: As for `to_json_line`.
        """
        self._file.truncate(0)
        self._write_line(header)

    def _write_line(self, record: Mapping[str, Any]) -> None:
        self._file.write(to_json_line(record).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def describe_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted path, as JSON gives it back."""
    return json.loads(to_json_line(dict(iterate_settings(config))))


def find_change(
    before: Mapping[str, Any], config: RunConfig, changeable: tuple[str, ...] = CHANGEABLE
) -> tuple[str, str] | None:
    """Find a setting by which a rollout cannot go on: another value may mean other tokens or another schedule.

    Args:
        before: `describe_settings` of the configuration that the rollout began with.
        config: What it is to go on with.
        changeable: Settings that do not matter, or how they begin.

    Returns:
        The first such setting's path and what is wrong with it; None if there is none.
    """
    for path, value in describe_settings(config).items():
        if value != before.get(path) and not path.startswith(changeable):
            return path, f"was {before.get(path)!r} when the rollout began, not {value!r}"
    return None
