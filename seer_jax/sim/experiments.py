"""The experiments of the paper, simulated: our figures in the paper's units, by seed."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError
from seer_jax.sim.beyond import compare_options
from seer_jax.sim.partial import simulate_partial
from seer_jax.sim.report import ExperimentResult, Figure, Timeline, WorkloadResult
from seer_jax.sim.simulation import SimResult
from seer_jax.sim.systems import draw_requests, find_system, simulate
from seer_jax.sim.workloads import Workload, load_workload

Values = dict[str, float]
Results = Mapping[str, SimResult]

TIMELINE_POINTS = 400
"""Moments at which a timeline is sampled."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is run and how the figures follow.

    Attributes:
        title: One line for people.
        source: Where the paper has it.
        systems: Names of `sim.systems.SYSTEMS`.
        figures: Values by name, from the results of one seed; names are those of the workload's `paper` section.
        units: Unit of a figure by the end of its name; "" is the default.
        fitted: Names of figures that the constants were chosen to meet.
        inputs: Names of figures that are constants, or 1 by definition.
        group_sizes: The experiment is run with each of them; None: the workload's own.
    """

    title: str
    source: str
    systems: tuple[str, ...]
    figures: Callable[[Results], Values]
    units: Mapping[str, str]
    fitted: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] | None = None


def _gains(results: Results) -> Values:
    """Throughput of every system over veRL's."""
    base = results["verl"].tokens_per_s
    return {name: result.tokens_per_s / base for name, result in results.items()}


def _breakdown(results: Results) -> Values:
    gains = _gains(results)
    tails = {name: result.tail_time_s for name, result in results.items()}
    return {
        "divided": gains["divided"],
        "context": gains["context"],
        "full": gains["seer"],
        "tail_reduction": 1 - tails["seer"] / tails["verl"],
    }


def _tail(results: Results) -> Values:
    return {
        f"{name}_{part}": value
        for name, result in results.items()
        for part, value in (("rollout_s", result.rollout_time_s), ("tail_s", result.tail_time_s))
    }


def _length_context(results: Results) -> Values:
    gains = _gains(results)
    base = results["verl"].tail_time_s
    names = {"no_context": "divided", "context": "context", "oracle": "oracle"}
    values = {name: gains[system] for name, system in names.items()}
    return values | {f"{name}_tail": results[system].tail_time_s / base for name, system in names.items()}


def _sd_strategies(results: Results) -> Values:
    gains = _gains(results)
    return {
        "vanilla_gain": gains["verl_sd"],
        "vanilla_tau": results["verl_sd"].mean_acceptance_length,
        "seer_gain": gains["verl_grouped_sd"],
        "seer_tau": results["verl_grouped_sd"].mean_acceptance_length,
    }


def _utilization(results: Results) -> Values:
    values = {}
    for name, result in results.items():
        values[f"{name}_preemptions"] = float(result.counters.num_preemptions)
        values[f"{name}_mean_kv"] = _mean_utilization(result)
    return values


EXPERIMENT_TABLE: Mapping[str, Experiment] = {
    "end_to_end": Experiment(
        title="Throughput over veRL, group size 8 and 16",
        source="Fig. 7",
        systems=("verl", "verl_sd", "streamrl_oracle", "streamrl_oracle_sd", "seer"),
        figures=_gains,
        units={"": "x veRL"},
        inputs=("verl_8", "verl_16"),
        group_sizes=(8, 16),
    ),
    "tail": Experiment(
        title="Time of a rollout and of its tail",
        source="Fig. 8",
        systems=("verl", "seer"),
        figures=_tail,
        units={"": "s"},
        fitted=("verl_rollout_s", "verl_tail_s", "seer_rollout_s", "seer_tail_s"),
    ),
    "breakdown": Experiment(
        title="Throughput over veRL, one idea after the other",
        source="Table 4",
        systems=("verl", "divided", "context", "seer"),
        figures=_breakdown,
        units={"tail_reduction": "share", "": "x veRL"},
        fitted=("divided", "context", "full", "tail_reduction"),
    ),
    "length_context": Experiment(
        title="What knowing lengths is worth, without speculation",
        source="Fig. 10",
        systems=("verl", "divided", "context", "oracle"),
        figures=_length_context,
        units={"_tail": "x veRL's tail", "": "x veRL"},
        fitted=("no_context", "context"),
    ),
    "sd_strategies": Experiment(
        title="Speculative decoding alone, on veRL",
        source="Fig. 11",
        systems=("verl", "verl_sd", "verl_grouped_sd"),
        figures=_sd_strategies,
        units={"_tau": "tokens a step", "": "x veRL"},
        fitted=("seer_gain", "seer_tau"),
        inputs=("vanilla_tau",),
    ),
    "utilization": Experiment(
        title="Running requests and KV use over time",
        source="Fig. 3 and 9",
        systems=("verl", "seer"),
        figures=_utilization,
        units={"_preemptions": "preemptions", "_mean_kv": "share"},
    ),
}
PARTIAL, BEYOND = "partial_rollout", "beyond_seer"
SPECIAL: Mapping[str, tuple[str, str]] = {
    PARTIAL: ("Seer over partial rollout, which puts long answers off to later iterations", "Fig. 12"),
    BEYOND: ("Options beyond the paper over Seer, and bounds", "not in the paper"),
}
"""Title and source of experiments that are not one comparison of systems on the same requests."""
SPECIAL_UNITS = {"_share": "share", "_idle": "share", "_gain": "x partial rollout", "": "x Seer"}
EXPERIMENTS: Mapping[str, str] = {
    **{name: f"{e.title} ({e.source})" for name, e in EXPERIMENT_TABLE.items()},
    **{name: f"{title} ({source})" for name, (title, source) in SPECIAL.items()},
}
"""Descriptions by name, for `seer-jax simulate`."""


def run_experiment(
    name: str, workloads: Sequence[str], *, seeds: Sequence[int], jobs: int = 2, scale: float = 1.0
) -> ExperimentResult:
    """Simulate one experiment.

    Args:
        name: One of `EXPERIMENTS`.
        workloads: Names or files.
        seeds: One iteration each; the same lengths for all systems.
        jobs: Processes.
        scale: Share of the paper's instances and requests.

    Raises:
        ConfigError: For an unknown name, or a workload that cannot be read.
    """
    if name not in EXPERIMENTS:
        raise ConfigError("experiment", f"no experiment {name!r}", did_you_mean(name, EXPERIMENTS))
    if jobs < 1:
        raise ConfigError("jobs", f"is {jobs}", "at least 1")
    started = time.perf_counter()
    loaded = [load_workload(workload).scaled(scale) for workload in workloads]
    # The slowest first, so that no process is left alone with it.
    order = sorted(loaded, key=lambda workload: -workload.num_requests * workload.lengths.mean)
    tasks = [(name, workload, seed, seed == seeds[0]) for workload in order for seed in seeds]
    if jobs == 1 or len(tasks) == 1:
        outcomes = [_run_seed(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(_run_seed, *zip(*tasks, strict=True)))
    by_workload = {
        workload.name: [o for t, o in zip(tasks, outcomes, strict=True) if t[1] is workload] for workload in order
    }
    firings: Counter[str] = Counter()
    for outcome in outcomes:
        firings.update(outcome.firings)
    title, source = _title(name)
    return ExperimentResult(
        experiment=name,
        title=title,
        source=source,
        seeds=tuple(seeds),
        scale=scale,
        wall_s=time.perf_counter() - started,
        workloads=tuple(_summarize(name, workload, by_workload[workload.name]) for workload in loaded),
        firings=dict(firings),
    )


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Of one workload and seed."""

    values: Values
    timelines: tuple[Timeline, ...]
    firings: Mapping[str, int]


def _run_seed(name: str, workload: Workload, seed: int, is_first: bool) -> _Outcome:
    if name == PARTIAL:
        return _Outcome(values=simulate_partial(workload, seed), timelines=(), firings={})
    if name == BEYOND:
        values, fired = compare_options(workload, seed)
        return _Outcome(values=values, timelines=(), firings=fired)
    experiment = EXPERIMENT_TABLE[name]
    values = {}
    timelines: list[Timeline] = []
    firings: Counter[str] = Counter()
    for size in experiment.group_sizes or (None,):
        chosen = workload if size is None else workload.with_values({"requests.group_size": size})
        requests = draw_requests(chosen, seed)
        record = name == "utilization"
        results = {
            system: simulate(chosen, find_system(system), requests, seed=seed, record=record)
            for system in experiment.systems
        }
        found = experiment.figures(results)
        values |= found if size is None else {f"{key}_{size}": value for key, value in found.items()}
        for system, result in results.items():
            firings.update(result.firings)
            if record and is_first:
                timelines.append(_timeline(find_system(system).label, result, chosen.num_instances))
    return _Outcome(values=values, timelines=tuple(timelines), firings=firings)


def _summarize(name: str, workload: Workload, outcomes: Sequence[_Outcome]) -> WorkloadResult:
    paper = dict(workload.paper.get(name, {}))
    if name == "breakdown" and (tail := workload.paper.get("tail")):
        paper["tail_reduction"] = 1 - tail["seer_tail_s"] / tail["verl_tail_s"]
    figures = tuple(
        Figure(
            name=figure,
            per_seed=tuple(outcome.values[figure] for outcome in outcomes),
            paper=paper.get(figure),
            kind=_kind(name, figure, workload),
            unit=_unit(name, figure),
        )
        for figure in outcomes[0].values
    )
    if name == BEYOND:
        figures = tuple(sorted(figures, key=lambda figure: -figure.mean))
    timelines = tuple(timeline for outcome in outcomes for timeline in outcome.timelines)
    return WorkloadResult(workload=workload.name, figures=figures, timelines=timelines, constants=workload.constants)


def _kind(name: str, figure: str, workload: Workload) -> str:
    """Where a figure comes from; the same run may be another experiment's."""
    if name not in EXPERIMENT_TABLE:
        return "predicted"
    experiment = EXPERIMENT_TABLE[name]
    if figure in experiment.inputs:
        return "input"
    own = workload.group_size
    # What drafting by a model costs was chosen to meet its gain; drafting from the text costs what Seer's does.
    fitted = {f"seer_{own}", *experiment.fitted}
    if workload.vanilla != "suffix":
        fitted |= {"vanilla_gain", f"verl_sd_{own}"}
    return "fitted" if figure in fitted else "predicted"


def _title(name: str) -> tuple[str, str]:
    if name in SPECIAL:
        return SPECIAL[name]
    return EXPERIMENT_TABLE[name].title, EXPERIMENT_TABLE[name].source


def _unit(name: str, figure: str) -> str:
    units = EXPERIMENT_TABLE[name].units if name in EXPERIMENT_TABLE else SPECIAL_UNITS
    return next(unit for end, unit in units.items() if figure.endswith(end))


def _mean_utilization(result: SimResult) -> float:
    """Share of all KV room in use, mean over time and instances."""
    total = 0.0
    instances = np.unique(result.changes[:, 1])
    for instance in instances:
        rows = result.changes[result.changes[:, 1] == instance]
        spans = np.diff(np.append(rows[:, 0], result.rollout_time_s))
        total += float((spans * rows[:, 3]).sum())
    return total / (len(instances) * result.rollout_time_s)


def _timeline(label: str, result: SimResult, num_instances: int) -> Timeline:
    """What each instance ran at even moments."""
    times = np.linspace(0.0, result.rollout_time_s, TIMELINE_POINTS)
    values = np.zeros((2, len(times), num_instances))
    for instance in range(num_instances):
        rows = result.changes[result.changes[:, 1] == instance]
        places = np.searchsorted(rows[:, 0], times, side="right") - 1
        known = places >= 0
        values[:, known, instance] = rows[places[known], 2:].T
    return Timeline(label=label, times_s=times, running=values[0], kv_utilization=values[1], spans=result.spans)
