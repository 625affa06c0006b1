"""Files of an experiment's result: JSON, CSV, charts, traces."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from seer_jax.obs.plots import Bar, BarPanel, Series, plot_bars, plot_timelines
from seer_jax.obs.trace import KV_UTILIZATION, RUNNING, Counter, Span, write_trace
from seer_jax.sim.report import ExperimentResult, Timeline, WorkloadResult, to_json, write_csv


def write_outputs(result: ExperimentResult, directory: Path, *, plots: bool) -> list[Path]:
    """Write everything that a result is kept as.

    Args:
        result: Any experiment's result.
        directory: Where to; exists. Files of the same names are replaced.
        plots: Whether to draw; needs matplotlib.

    Returns:
        The files: `{experiment}.json` and `.csv`, `{experiment}.png` and `.svg` with our figures beside the paper's;
        for workloads with timelines also `{experiment}_{workload}.png` and `.svg`, `trace_{workload}_{label}.json.gz`.

    Raises:
        ConfigError: If matplotlib is wanted and missing.
    """
    files = [directory / f"{result.experiment}.json", directory / f"{result.experiment}.csv"]
    files[0].write_text(json.dumps(to_json(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_csv(result, files[1])
    for workload in result.workloads:
        for timeline in workload.timelines:
            files.append(directory / f"trace_{_file_name(workload.workload)}_{_file_name(timeline.label)}.json.gz")
            write_trace(files[-1], iterate_spans(timeline), iterate_counters(timeline))
    if plots:
        files += _draw(result, directory)
    return files


def describe_seeds(seeds: Sequence[int]) -> str:
    """Such as "seed 100" or "seeds 100–104"; ends a sentence about how often something was simulated."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    is_range = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"seeds {seeds[0]}–{seeds[-1]}" if is_range else f"seeds {', '.join(map(str, seeds))}"


def iterate_spans(timeline: Timeline) -> Iterator[Span]:
    """The chunks of a timeline, as a trace has them."""
    for instance, name, start_s, end_s in timeline.spans:
        yield Span(process=f"instance {instance}", name=name, start_s=float(start_s), end_s=float(end_s))


def iterate_counters(timeline: Timeline) -> Iterator[Counter]:
    """What a timeline counts on each instance, as a trace has it."""
    for name, values in ((RUNNING, timeline.running), (KV_UTILIZATION, timeline.kv_utilization)):
        for instance in range(values.shape[1]):
            process = f"instance {instance}"
            yield Counter(process=process, name=name, times_s=timeline.times_s, values=values[:, instance])


def _draw(result: ExperimentResult, directory: Path) -> list[Path]:
    seeds = describe_seeds(result.seeds)
    scale = "" if result.scale == 1 else f", {result.scale:g} of the paper's cluster"
    files = []
    panels = [panel for workload in result.workloads for panel in _make_panels(workload)]
    if panels:
        repeats = f"{seeds}, mean and standard deviation" if len(result.seeds) > 1 else seeds
        caption = f"simulated ({repeats}{scale}); paper: {result.source}"
        files += plot_bars(panels, directory / result.experiment, title=result.title, caption=caption)
    for workload in result.workloads:
        if workload.timelines:
            series = [
                Series(label=one.label, times_s=one.times_s, running=one.running, kv_utilization=one.kv_utilization)
                for one in workload.timelines
            ]
            path = directory / f"{result.experiment}_{_file_name(workload.workload)}"
            title = f"{workload.workload}: load of the instances over time"
            files += plot_timelines(series, path, title=title, caption=f"simulated, seed {result.seeds[0]}{scale}")
    return files


def _make_panels(workload: WorkloadResult) -> Iterator[BarPanel]:
    """One panel for each unit of a workload's figures."""
    units = list(dict.fromkeys(figure.unit for figure in workload.figures))
    figures = sorted(workload.figures, key=lambda figure: units.index(figure.unit))
    for unit, group in groupby(figures, key=lambda figure: figure.unit):
        bars = tuple(Bar(label=f.name, ours=f.mean, spread=f.spread, paper=f.paper) for f in group)
        yield BarPanel(title=workload.workload, unit=unit, bars=bars)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
