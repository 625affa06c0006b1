"""`seer-jax simulate`: the paper's experiments at the paper's scale, simulated, beside the paper's figures."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from seer_jax.cli.arguments import Switch, parse_options
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.plots import INSTALL_HINT, has_matplotlib
from seer_jax.obs.run_dir import fill_run_dir
from seer_jax.obs.tables import print_columns

if TYPE_CHECKING:
    from seer_jax.sim.report import ExperimentResult, Figure

ALL = "all"
MAX_SCALE = 100
"""Some 25,000 accelerators and 640,000 requests; more is a slip of the keyboard that would fill the memory."""
WORKLOADS = ("moonlight", "qwen2_vl_72b", "kimi_k2")
"""The paper's, in its order."""


@dataclass(frozen=True, kw_only=True)
class SimulateArguments:
    """Repeat experiments of the paper at its scale in simulation: the scheduling is the real one, the hardware a model.

    Writes JSON, CSV, charts and, of experiments with timelines, traces for https://ui.perfetto.dev.
    """

    experiment: str = "breakdown"
    """Experiments with commas between, or `all`, which take hours; `--list` names them."""
    workload: str = ALL
    """Workloads with commas between: moonlight, qwen2_vl_72b, kimi_k2, paths of YAML files; or `all` three."""
    seeds: int = 5
    """How many seeds to simulate with; what is reported is their mean."""
    first_seed: int = 100
    """The first of them. Constants were fitted with other seeds than these."""
    jobs: int = 2
    """Processes."""
    scale: float = 1.0
    """Instances and requests as a share of the workload's, with the same load per instance."""
    out: str = "runs/simulate-{time}"
    """Directory to write to; files of the same names are replaced."""
    replay: str | None = None
    """Instead of experiments: directory of a `seer-jax rollout`, which is replayed, simulated, and compared."""
    profile: str | None = None
    """With --replay: step times of the same configuration, from `seer-jax profile --out FILE`."""
    no_plots: Switch = False
    """Draw no charts."""
    list: Switch = False
    """Name the experiments and the workloads, and stop."""
    json: Switch = False
    """Stdout is one JSON object: of one experiment its result, of several `experiments` by name."""


def main(argv: Sequence[str]) -> int:
    """Simulate, write, print.

    Args:
        argv: Arguments after `simulate`.

    Returns:
        0; 1 if an option that was on never fired, so that its figures say nothing.

    Raises:
        ConfigError: For bad arguments or a workload that does not fit.
    """
    arguments = parse_options(argv, prog="seer-jax simulate", defaults=SimulateArguments())

    if arguments.replay is not None or arguments.profile is not None:
        return _predict(arguments)

    from seer_jax.sim.experiments import EXPERIMENTS, run_experiment
    from seer_jax.sim.outputs import write_outputs
    from seer_jax.sim.report import to_json

    if arguments.list:
        _print_list(EXPERIMENTS, json=arguments.json)
        return 0
    experiments = _pick("experiment", arguments.experiment, EXPERIMENTS)
    workloads = _pick("workload", arguments.workload, WORKLOADS)
    _check(arguments, workloads)
    directory = _make_directory(arguments.out)
    plots = not arguments.no_plots and has_matplotlib()
    if not plots and not arguments.no_plots:
        print(f"seer-jax: no charts without matplotlib: {INSTALL_HINT}, or --no-plots", file=sys.stderr)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    started = time.perf_counter()
    reports, silent = {}, []
    for name in experiments:
        print(f"simulating {name}: {', '.join(workloads)}; {len(seeds)} seeds", file=sys.stderr)
        result = run_experiment(name, workloads, seeds=tuple(seeds), jobs=arguments.jobs, scale=arguments.scale)
        write_outputs(result, directory, plots=plots)
        reports[name] = to_json(result)
        silent += [option for option, count in result.firings.items() if not count]
        if not arguments.json:
            print_result(result)
    wall_s = time.perf_counter() - started
    if arguments.json:
        several = {"simulated": True, "wall_s": wall_s, "experiments": reports}
        print(to_json_line((several if len(reports) > 1 else reports[experiments[0]]) | {"out": str(directory)}))
    else:
        print(f"simulated in {wall_s:.1f} s, written to {directory}")
    if silent:
        print(f"seer-jax: on, but never fired, so not tested: {', '.join(silent)}", file=sys.stderr)
        return 1
    return 0


def _predict(arguments: SimulateArguments) -> int:
    """Replay and simulate a real run."""
    if arguments.replay is None or arguments.profile is None:
        given, missing = ("profile", "replay") if arguments.replay is None else ("replay", "profile")
        raise ConfigError(missing, f"is not given, --{given} is", "both, a run and the step times of its machine")
    try:
        text = Path(arguments.profile).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "profile", f"cannot read {arguments.profile!r}: {error.strerror}", "`seer-jax profile`"
        ) from error

    from seer_jax.core.latency import MeasuredStepTimes
    from seer_jax.sim.replay import predict

    rows = [
        prediction.to_json()
        for prediction in predict(Path(arguments.replay).expanduser(), MeasuredStepTimes.from_json(text))
    ]
    if arguments.json:
        print(to_json_line({"simulated": True, "rollouts": rows}))
    else:
        print_columns(rows)
    return 0


def print_result(result: "ExperimentResult", *, console: Console | None = None) -> None:
    """Print an experiment's figures beside the paper's.

    Args:
        result: Any experiment's result.
        console: Where to; None is stdout.
    """
    from seer_jax.sim.outputs import describe_seeds

    console = console or Console()
    share = "" if result.scale == 1 else f", scale {result.scale:g}"
    heading = f"{result.experiment}: {result.title} ({result.source})"
    console.print(Text(heading, style="bold"))
    console.print(Text(f"simulated, {describe_seeds(result.seeds)}{share}, {result.wall_s:.1f} s", style="dim"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (
        ("", "left"), ("simulated", "right"), ("paper", "right"), ("error", "right"), ("unit", "left"), ("kind", "left")
    ):  # fmt: skip
        table.add_column(name, justify=justify)
    for workload in result.workloads:
        table.add_row(Text(workload.workload, style="bold"))
        for figure in workload.figures:
            table.add_row(f"  {figure.name}", *_describe(figure))
    console.print(table)
    console.print()


def _describe(figure: "Figure") -> tuple[str, ...]:
    """Mean and spread, the paper's value and by how much we miss it, as text with the same number of digits."""
    largest = max(abs(figure.mean), abs(figure.paper or 0.0))
    digits = 0 if largest >= 1000 else 1 if largest >= 10 else 3
    ours = f"{figure.mean:,.{digits}f}"
    if len(figure.per_seed) > 1:
        ours += f" ± {figure.spread:,.{digits}f}"
    paper = "-" if figure.paper is None else f"{figure.paper:,.{digits}f}"
    error = "-" if figure.error is None else f"{figure.error:+.1%}"
    return ours, paper, error, figure.unit, figure.kind


def _pick(option: str, text: str, names: Iterable[str]) -> list[str]:
    """The names in `A,B,...` or all of them; a workload's may also be the path of a file."""
    known = list(names)
    picked = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if picked == [ALL]:
        return known
    for name in picked:
        is_file = option == "workload" and name.endswith((".yaml", ".yml"))
        if not is_file and name not in known:
            raise ConfigError(option, f"no {option} {name!r}", did_you_mean(name, [*known, ALL]))
    return picked


def _check(arguments: SimulateArguments, workloads: Sequence[str]) -> None:
    """Everything that can be wrong, before anything is simulated or written."""
    for name, lowest in (("seeds", 1), ("first_seed", 0), ("jobs", 1)):
        if getattr(arguments, name) < lowest:
            raise ConfigError(name, f"is {getattr(arguments, name)}", f"at least {lowest}")
    if not 0 < arguments.scale <= MAX_SCALE:
        raise ConfigError("scale", f"is {arguments.scale}", f"above 0, at most {MAX_SCALE}; 1 is the paper's")

    from seer_jax.sim.workloads import load_workload

    loaded = [load_workload(workload).name for workload in workloads]
    twice = next((name for name in loaded if loaded.count(name) > 1), None)
    if twice is not None:
        raise ConfigError("workload", f"two are named {twice!r}", "rename one of the files")


def _make_directory(template: str) -> Path:
    try:
        directory = fill_run_dir(template, "simulate", datetime.now())
        directory.mkdir(parents=True, exist_ok=True)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError("out", f"cannot be filled in: {template!r}", "use {name} and {time} only") from error
    except OSError as error:
        raise ConfigError("out", f"cannot write to {str(directory)!r}: {error.strerror}", "give another one") from error
    return directory


def _print_list(experiments: Mapping[str, str], *, json: bool) -> None:
    if json:
        print(to_json_line({"experiments": dict(experiments), "workloads": list(WORKLOADS)}))
        return
    width = max(map(len, experiments))
    print("experiments", *(f"  {name:<{width}}  {text}" for name, text in experiments.items()), sep="\n")
    print("workloads", *(f"  {name}" for name in WORKLOADS), sep="\n")
