"""The event log of the training iteration under way: a run that is killed in a rollout goes on inside it."""

import json

from seer_jax.config.schema import RunConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ProtocolError, SeerError
from seer_jax.core.eventlog import decode_events, replay
from seer_jax.core.events import Event
from seer_jax.obs.event_file import CHANGEABLE, EventFile, describe_settings, find_change

HEADER = "IterationBegun"
"""`type` of the first line: iteration, policy version and settings."""
IRRELEVANT = (*CHANGEABLE, "train.")
"""Settings that do not matter for a rollout whose weights are there; `train.` is about those that come next."""


class IterationLog:
    """Which iteration is under way, and its events so far.

    The file begins anew with every iteration. So if it is of the iteration that follows the last checkpoint, then no
    process has gone back to an earlier one since, and the weights that spoke in it are the checkpoint's, bit for bit.
    """

    def __init__(self, file: EventFile, config: RunConfig) -> None:
        """Take over a file.

        Args:
            file: That of the run; the caller closes it.
            config: The run.
        """
        self._file, self._config = file, config

    def begin(self, iteration: int, policy_version: int) -> None:
        """Drop the last iteration's events.

        Args:
            iteration: Which one begins; they count from 0.
            policy_version: Of the weights that speak in it.
        """
        settings = describe_settings(self._config)
        self._file.begin(
            {"type": HEADER, "iteration": iteration, "policy_version": policy_version, "settings": settings}
        )

    def write(self, event: Event) -> None:
        """Append an event of the iteration."""
        self._file.write(event)

    def find_history(self, iteration: int, policy_version: int, driver: RolloutDriver) -> tuple[list[Event], str]:
        """Read what an earlier process left of the iteration that is next.

        Args:
            iteration: The next one.
            policy_version: Of the weights that are there.
            driver: One of the run, fresh; it is used up in trying whether the events replay.

        Returns:
            The events from the first on. If there are none though an iteration was interrupted: why.
        """
        try:
            lines = self._file.read()
            if not lines:
                return [], ""
            header = json.loads(lines[0])
            if not isinstance(header, dict) or header.get("type") != HEADER:
                raise ProtocolError(f"it does not begin with {HEADER}")
            if header["iteration"] < iteration:
                return [], ""  # It is done.
            if (header["iteration"], header["policy_version"]) != (iteration, policy_version):
                logged = f"iteration {header['iteration'] + 1} and policy version {header['policy_version']}"
                return [], f"the event log is of {logged}, the checkpoint has policy version {policy_version}"
            if (change := find_change(header["settings"], self._config, IRRELEVANT)) is not None:
                return [], " ".join(change)
            events = list(decode_events(lines[1:]))
            for _ in replay(events, driver):
                pass
        except (SeerError, ValueError, KeyError) as error:
            return [], f"the event log cannot be read by this version of seer_jax: {error}"
        return events, ""
