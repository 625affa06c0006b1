"""Charts of results, by matplotlib, which is imported only here and only when something is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, Num

from seer_jax.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL_HINT = "pip install 'seer_jax[plots]'"
FORMATS = ("png", "svg")

OURS, PAPER, INK, FAINT = "#2563a8", "#c9ced6", "#22262b", "#e6e8eb"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "legend.frameon": False,
    "svg.hashsalt": "seer_jax",  # The same chart is the same file.
}
MAX_BARS_ACROSS = 14
"""Pairs of bars that fit side by side."""
LABEL_WIDTH = 11
"""Characters of a line below a pair of bars."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One number of ours beside the paper's.

    Attributes:
        label: What it is, such as "divided".
        ours: Mean over the seeds.
        spread: Half the height of the error bar, in the unit of `ours`.
        paper: None if the paper gives no value.
    """

    label: str
    ours: float
    spread: float
    paper: float | None


@dataclass(frozen=True, kw_only=True)
class BarPanel:
    """Bars that share an axis.

    Attributes:
        title: Such as the workload.
        unit: Label of the axis.
        bars: From left to right.
    """

    title: str
    unit: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """What each of several instances did over time.

    Attributes:
        label: System, such as "veRL".
        times_s: Ascending.
        running: Requests in steps.
        kv_utilization: Share of KV in use, 0 to 1.
    """

    label: str
    times_s: Float64[np.ndarray, " samples"]
    running: Num[np.ndarray, "samples instances"]
    kv_utilization: Num[np.ndarray, "samples instances"]


def has_matplotlib() -> bool:
    """Whether charts can be drawn here."""
    return find_spec("matplotlib") is not None


def plot_bars(panels: Sequence[BarPanel], path: Path, *, title: str, caption: str = "") -> list[Path]:
    """Draw our numbers beside the paper's.

    Args:
        panels: One axis each, at least one; side by side as far as they fit.
        path: Where to, without suffix; `FORMATS` are appended.
        title: What the chart shows.
        caption: Small print below.

    Returns:
        The files.

    Raises:
        ConfigError: If matplotlib is missing.
    """
    figure_class = _load_matplotlib()
    with _style():
        columns = _count_columns(panels)
        rows = -(-len(panels) // columns)
        widths = [max(max(2, len(panel.bars)) for panel in panels[column::columns]) for column in range(columns)]
        size = (max(6.0, 1.4 + 0.85 * sum(widths)), 1.0 + 2.7 * rows)
        figure = figure_class(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, width_ratios=widths).flatten()
        for index, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
            is_known = index % columns > 0 and panel.unit == panels[index - 1].unit
            _draw_bars(axis, panel, with_unit=not is_known)
        for axis in axes[len(panels) :]:
            axis.remove()
        _add_legend(figure, axes[: len(panels)])
        return _save(figure, path, title, caption)


def plot_timelines(series: Sequence[Series], path: Path, *, title: str, caption: str = "") -> list[Path]:
    """Draw running requests and KV utilization over time: the mean of the instances as a line, their range as a band.

    Args:
        series: One column each; all share their axes.
        path: Where to, without suffix; `FORMATS` are appended.
        title: What the chart shows.
        caption: Small print below.

    Returns:
        The files.

    Raises:
        ConfigError: If matplotlib is missing.
    """
    figure_class = _load_matplotlib()
    with _style():
        figure = figure_class(figsize=(1.0 + 4.2 * len(series), 5.0), layout="constrained")
        axes = figure.subplots(2, len(series), squeeze=False, sharex=True, sharey="row")
        for column, one in enumerate(series):
            _draw_band(axes[0][column], one.times_s, one.running)
            _draw_band(axes[1][column], one.times_s, 100.0 * one.kv_utilization)
            axes[0][column].set_title(one.label)
            axes[1][column].set_xlabel("simulated time in s")
        axes[0][0].set_ylabel("running requests\nper instance")
        axes[1][0].set_ylabel("KV cache in use\nper instance in %")
        axes[0][0].set_ylim(bottom=0)
        axes[1][0].set_ylim(0, 104)
        axes[0][0].set_xlim(0, max(float(one.times_s[-1]) for one in series))
        _add_legend(figure, axes.flatten())
        return _save(figure, path, title, caption)


def _count_columns(panels: Sequence[BarPanel]) -> int:
    """All panels side by side if they fit, else a column for every unit, else below each other."""
    widest = max(len(panel.bars) for panel in panels)
    num_units = len({panel.unit for panel in panels})
    return next((n for n in (len(panels), num_units) if n * widest <= MAX_BARS_ACROSS), 1)


def _draw_bars(axis: "Axes", panel: BarPanel, *, with_unit: bool) -> None:
    places = np.arange(len(panel.bars))
    ours = [bar.ours for bar in panel.bars]
    spreads = [bar.spread for bar in panel.bars]
    known = [(place, bar.paper) for place, bar in zip(places, panel.bars, strict=True) if bar.paper is not None]
    # Without a partner, ours stands in the middle.
    shift = [0.2 if bar.paper is not None else 0.0 for bar in panel.bars]
    error_style = {"ecolor": INK, "elinewidth": 1.0, "capsize": 2.5}
    error_bars = {"yerr": spreads, "error_kw": error_style} if any(spreads) else {}
    if known:
        papers = axis.bar([p - 0.2 for p, _ in known], [v for _, v in known], 0.38, color=PAPER, label="paper")
        axis.bar_label(papers, fmt=_format, padding=2, fontsize=8, color="#6b7280")
    simulated = axis.bar(places + shift, ours, 0.38, color=OURS, label="simulated", **error_bars)
    axis.bar_label(simulated, labels=list(map(_format, ours)), padding=2, fontsize=8)
    axis.set_title(panel.title)
    labels = [fill(bar.label.replace("_", " "), LABEL_WIDTH, break_long_words=False) for bar in panel.bars]
    axis.set_xticks(places, labels, fontsize=9)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.6, max(len(panel.bars), 1) - 0.4)
    axis.margins(y=0.14)
    axis.locator_params(axis="y", nbins=5)
    axis.set_ylim(bottom=min(0.0, *ours) if ours else 0.0)
    axis.grid(True, axis="y")
    axis.spines["left"].set_visible(False)
    if with_unit:
        axis.set_ylabel(panel.unit)


def _draw_band(axis: "Axes", times_s: np.ndarray, values: np.ndarray) -> None:
    lowest, highest = values.min(axis=1), values.max(axis=1)
    axis.fill_between(times_s, lowest, highest, color=OURS, alpha=0.18, linewidth=0, label="lowest to highest instance")
    axis.plot(times_s, values.mean(axis=1), color=OURS, linewidth=1.6, label="mean of the instances")
    axis.grid(True, axis="y")


def _add_legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One legend for all axes, below them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=len(handles), fontsize=9)


def _format(value: float) -> str:
    """A number over a bar: as many digits as tell bars apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _save(figure: "Figure", path: Path, title: str, caption: str) -> list[Path]:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    if caption:
        figure.supxlabel(caption, x=0.99, ha="right", fontsize=8, color="#6b7280")
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in FORMATS]
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=160, facecolor="white", metadata=metadata)
    return files


def _load_matplotlib() -> type["Figure"]:
    """matplotlib's figure without pyplot: no display, no global state."""
    if not has_matplotlib():
        raise ConfigError("plots", "matplotlib is not installed", INSTALL_HINT)
    from matplotlib.figure import Figure

    return Figure


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE)
