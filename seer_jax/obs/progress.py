"""Live view of a rollout: one line per instance, one for the whole."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seer_jax.core.commands import Command, EmitSample
from seer_jax.core.events import Event, GroupsSubmitted, InstanceReport
from seer_jax.core.types import InstanceStatus

REFRESHES_PER_S = 4


class ProgressDisplay:
    """Shows what the rollout loop sees; pass `on_event` to it.

    Draws on stderr, so that stdout stays clean, and only on a terminal. Use it as a context manager.

    Args:
        enabled: False draws nothing; events are still counted.
        console: Where to draw; None is stderr.
    """

    def __init__(self, *, enabled: bool, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self.num_requests = 0
        self.num_finished = 0
        self._policy_version = 0
        self._elapsed_s = 0.0
        self._statuses: dict[int, InstanceStatus] = {}
        self._live = (
            Live(get_renderable=self.render, console=console, refresh_per_second=REFRESHES_PER_S, transient=True)
            if enabled and console.is_terminal
            else None
        )

    def on_event(self, elapsed_s: float, event: Event, commands: Sequence[Command]) -> None:
        """Take in one event of the rollout loop.

        Args:
            elapsed_s: Seconds since the rollout began.
            event: What happened.
            commands: What the driver answered.
        """
        self._elapsed_s = elapsed_s
        if isinstance(event, GroupsSubmitted):
            self.num_requests = sum(group.group_size for group in event.groups)
            self.num_finished = 0
            self._policy_version = event.policy_version
            self._statuses = {}
        elif isinstance(event, InstanceReport):
            # Replaced, never changed: the display's own thread may be reading it.
            self._statuses = self._statuses | {event.status.instance_id: event.status}
        self.num_finished += sum(isinstance(command, EmitSample) for command in commands)

    def render(self) -> Group:
        """Draw the current state."""
        table = Table(box=None, pad_edge=False)
        for heading in ("instance", "running", "waiting", "KV used", "", "tokens/s"):
            table.add_column(heading, justify="right")
        for _, status in sorted(self._statuses.items()):
            used = status.num_total_pages - status.num_free_pages
            table.add_row(
                str(status.instance_id),
                str(status.num_running),
                str(status.num_waiting),
                f"{used / status.num_total_pages:.0%}",
                ProgressBar(total=status.num_total_pages, completed=used, width=16),
                self._rate(status.num_generated_tokens),
            )
        tokens = sum(status.num_generated_tokens for status in self._statuses.values())
        whole = f"{self.num_finished}/{self.num_requests} responses, {tokens:,} tokens, {self._rate(tokens)} tokens/s"
        return Group(Text(f"policy version {self._policy_version}: {whole}"), table)

    def _rate(self, tokens: int) -> str:
        return f"{tokens / self._elapsed_s:,.0f}" if self._elapsed_s > 0 else "-"

    def __enter__(self) -> "ProgressDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
