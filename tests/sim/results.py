"""Small results of experiments, for tests of what is made of them."""

from types import SimpleNamespace

import numpy as np

from seer_jax.sim.report import ExperimentResult, Figure, Timeline, WorkloadResult


def make_figure(name: str = "divided", *values: float, paper: float | None = 1.5, kind: str = "predicted") -> Figure:
    return Figure(name=name, per_seed=values or (1.0, 2.0, 3.0), paper=paper, kind=kind, unit="x veRL")


def make_timeline(label: str = "Seer", *, instances: int = 3) -> Timeline:
    times_s = np.linspace(0.0, 100.0, 21)
    running = np.maximum(0, 8 - (np.arange(21) // 3)[:, None] + np.arange(instances)[None, :])
    spans = tuple(
        (instance, f"g{group}/0#0", 10.0 * group, 10.0 * group + 15.0)
        for instance in range(instances)
        for group in range(4)
    )
    return Timeline(label=label, times_s=times_s, running=running, kv_utilization=running / 16, spans=spans)


def make_result(experiment: str = "breakdown", *workloads: str, timelines: bool = False) -> ExperimentResult:
    both = (make_timeline("veRL"), make_timeline("Seer")) if timelines else ()
    constant = SimpleNamespace(value=np.float64(0.03), kind="fitted", source="veRL's rollout time")
    return ExperimentResult(
        experiment=experiment,
        title="Throughput as parts are added",
        source="Table 4",
        seeds=(100, 101, 102),
        scale=1.0,
        wall_s=2.5,
        workloads=tuple(
            WorkloadResult(
                workload=workload,
                figures=(
                    make_figure("divided"),
                    make_figure("context", 1.5, 1.5, 1.5, paper=None, kind="fitted"),
                    make_figure("oracle_tail", 0.0, 0.0, 0.5, paper=0.0),
                ),
                timelines=both,
                constants={"step_overhead_s": constant},
            )
            for workload in workloads or ("moonlight",)
        ),
        firings={"chunks": 12},
    )
