"""Tables for humans, on stdout."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(values: Mapping[str, Any], *, title: str = "", console: Console | None = None) -> None:
    """Print names and values below each other: the end of an iteration, of a run, a plan.

    Args:
        values: What to print, in this order.
        title: Heading.
        console: Where to; None is stdout.
    """
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in values.items():
        table.add_row(name, format_value(value))
    (console or Console()).print(table)


def print_rollouts(runs: Sequence[Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Print rollouts side by side, one column each.

    Args:
        runs: Figures of each rollout, under the same names; `policy` heads the column.
        console: Where to; None is stdout.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="dim")
    for run in runs:
        table.add_column(str(run["policy"]), justify="right", overflow="fold")
    for name in runs[0]:
        if name != "policy":
            table.add_row(name, *(format_value(run[name]) for run in runs))
    (console or Console()).print(table)


def print_columns(rows: Sequence[Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Print records below each other, a column for each name; what a record lacks stays empty.

    Args:
        rows: Records.
        console: Where to; None is stdout.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", header_style="dim")
    for row in rows:
        table.add_row(*(format_value(row.get(name, "")) for name in names))
    (console or Console()).print(table)


def format_value(value: Any) -> str:
    """Write a number in few digits: thousands grouped, four significant figures below 1000."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
