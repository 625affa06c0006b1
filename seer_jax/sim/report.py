"""Results of simulated experiments as plain data: beside the paper's figures, as JSON, as CSV."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Num

RESERVED_NAMES = ("details", "constants")
"""Keys of a workload in the JSON that are not figures."""

T_QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
"""97.5 % quantiles of Student's t by degrees of freedom; 2 beyond is off by less than a tenth."""

CSV_COLUMNS = ("experiment", "workload", "figure", "unit", "seed", "value", "paper", "kind")


@runtime_checkable
class CalibrationConstant(Protocol):
    """What a report needs of a `Constant` of a workload.

    Attributes:
        value: Number, or numbers.
        kind: "physical", "measured" or "fitted".
        source: Where it comes from.
    """

    value: Any
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of the paper and ours.

    Attributes:
        name: Such as "divided"; a key of the JSON.
        per_seed: Our value for each seed, in `unit`.
        paper: The paper's value in `unit`; None if it gives none.
        kind: "input" if it is a constant or 1 by definition, "fitted" if constants were chosen to meet it, else
            "predicted".
        unit: Such as "x veRL", "s", "share".
    """

    name: str
    per_seed: tuple[float, ...]
    paper: float | None
    kind: str
    unit: str

    def __post_init__(self) -> None:
        """Check what a report relies on.

        Raises:
            ValueError: If there is no value, one is not finite, or the kind is unknown.
        """
        if not self.per_seed or not all(map(math.isfinite, self.per_seed)):
            raise ValueError(f"figure {self.name!r} is {self.per_seed}: one finite value per seed is wanted")
        if self.paper is not None and not math.isfinite(self.paper):
            raise ValueError(f"figure {self.name!r}: the paper's value is {self.paper}")
        if self.kind not in ("input", "fitted", "predicted"):
            raise ValueError(f"figure {self.name!r} is {self.kind!r}, neither input nor fitted nor predicted")

    @property
    def mean(self) -> float:
        """Mean over the seeds, in `unit`."""
        return fmean(self.per_seed)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds, in `unit`; 0 for one seed."""
        return stdev(self.per_seed) if len(self.per_seed) > 1 else 0.0

    @property
    def half_width(self) -> float | None:
        """Of the 95 % confidence interval of the mean, Student's t, in `unit`; None for one seed."""
        count = len(self.per_seed)
        if count < 2:
            return None
        return T_QUANTILES.get(count - 1, 2.0) * self.spread / math.sqrt(count)

    @property
    def error(self) -> float | None:
        """Mean over the paper's value, minus 1; None where the paper gives no value or 0."""
        return self.mean / self.paper - 1 if self.paper else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """One simulated rollout over time, of one seed; seconds are simulated, from the submission of the groups.

    Attributes:
        label: System, such as "veRL" or "Seer".
        times_s: When the values below were taken, ascending.
        running: Requests that decode on each instance.
        kv_utilization: Share of each instance's KV tokens in use, 0 to 1.
        spans: Chunks as (instance, name such as "g12/3#1", start in s, end in s), for the trace.
    """

    label: str
    times_s: Float64[np.ndarray, " samples"]
    running: Num[np.ndarray, "samples instances"]
    kv_utilization: Num[np.ndarray, "samples instances"]
    spans: tuple[tuple[int, str, float, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkloadResult:
    """What an experiment gave for one workload.

    Attributes:
        workload: Name of the workload.
        figures: Numbers, in the order in which they are shown.
        timelines: Rollouts over time; () for most experiments.
        constants: Every constant that went in, by dotted name.
    """

    workload: str
    figures: tuple[Figure, ...]
    timelines: tuple[Timeline, ...] = ()
    constants: Mapping[str, CalibrationConstant]

    def __post_init__(self) -> None:
        """Check that the names can be keys of one JSON object.

        Raises:
            ValueError: If a figure's name is taken.
        """
        names = [figure.name for figure in self.figures]
        if len(set(names)) < len(names) or set(names) & set(RESERVED_NAMES):
            raise ValueError(f"{self.workload}: a name is given twice or is one of {RESERVED_NAMES} in {names}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentResult:
    """What one experiment gave for all its workloads.

    Attributes:
        experiment: Its name on the command line.
        title: One line for people.
        source: Where the paper has it, such as "Table 4".
        seeds: Seeds, one for each entry of every `Figure.per_seed`.
        scale: Instances and requests as a share of the paper's.
        wall_s: Real seconds that the simulation took.
        workloads: One result each.
        firings: How often the mechanisms of the simulated system fired, by name, all runs together.
    """

    experiment: str
    title: str
    source: str
    seeds: tuple[int, ...]
    scale: float
    wall_s: float
    workloads: tuple[WorkloadResult, ...]
    firings: Mapping[str, int]

    def __post_init__(self) -> None:
        """Check that every figure has a value for every seed.

        Raises:
            ValueError: If one has fewer or more.
        """
        for result in self.workloads:
            for figure in result.figures:
                if len(figure.per_seed) != len(self.seeds):
                    raise ValueError(f"{result.workload} {figure.name}: {len(figure.per_seed)} values, {self.seeds=}")


def to_json(result: ExperimentResult) -> dict[str, Any]:
    """Turn a result into plain, finite JSON values.

    Args:
        result: Any experiment's result; timelines are left out, they go to plots and traces.

    Returns:
        `workloads` holds, by workload, the plain mean of every figure under its name, and `details` and `constants`.
    """
    return {
        "experiment": result.experiment,
        "title": result.title,
        "source": result.source,
        "simulated": True,
        "seeds": [int(seed) for seed in result.seeds],
        "scale": float(result.scale),
        "wall_s": float(result.wall_s),
        "workloads": {workload.workload: _workload_to_json(workload) for workload in result.workloads},
        "firings": {name: int(count) for name, count in result.firings.items()},
    }


def write_csv(result: ExperimentResult, path: Path) -> None:
    """Write one row per workload, figure and seed, see `CSV_COLUMNS`; `paper` is empty where the paper gives no value.

    Args:
        result: Any experiment's result.
        path: File to write; one that exists is replaced.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for workload in result.workloads:
            for figure in workload.figures:
                for seed, value in zip(result.seeds, figure.per_seed, strict=True):
                    paper = "" if figure.paper is None else float(figure.paper)
                    names = (result.experiment, workload.workload, figure.name, figure.unit)
                    writer.writerow((*names, int(seed), float(value), paper, figure.kind))


def _workload_to_json(workload: WorkloadResult) -> dict[str, Any]:
    means = {figure.name: float(figure.mean) for figure in workload.figures}
    details = {figure.name: _figure_to_json(figure) for figure in workload.figures}
    constants = {
        name: {"value": _to_plain(constant.value), "kind": constant.kind, "source": constant.source}
        for name, constant in workload.constants.items()
    }
    return means | {"details": details, "constants": constants}


def _figure_to_json(figure: Figure) -> dict[str, Any]:
    return {
        "mean": float(figure.mean),
        "spread": float(figure.spread),
        "ci95": None if figure.half_width is None else float(figure.half_width),
        "per_seed": [float(value) for value in figure.per_seed],
        "paper": None if figure.paper is None else float(figure.paper),
        "error": None if figure.error is None else float(figure.error),
        "kind": figure.kind,
        "unit": figure.unit,
    }


def _to_plain(value: Any) -> Any:
    """Numbers of numpy as Python's; infinities and NaN, which JSON lacks, as None."""
    if isinstance(value, np.generic | np.ndarray):
        return _to_plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
