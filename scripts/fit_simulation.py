"""Fits the constants of a simulated workload to the paper's figures, on seeds that no report uses.

    python scripts/fit_simulation.py moonlight --minutes 10 --out fit_moonlight.json

Two stages of random search over boxes of plausible values, then of smaller and smaller steps around the best: first
memory, lengths and step times against the systems without speculation, then what drafting costs against those with it.
What is fitted, and to what, is in `STAGES`; everything else that a report shows is a prediction. Copy the result into
`configs/sim/`.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.sim.systems import SYSTEMS, draw_requests, simulate
from seer_jax.sim.workloads import Workload, load_workload

FIT_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Stage:
    """Constants, and the figures that they are chosen to meet.

    Attributes:
        systems: What must be simulated.
        knobs: Box of each constant; `cluster.kv_share` is of kv_bytes_per_rank.
        weights: What the squared log error of each figure counts.
        time_share: Of the whole search.
    """

    systems: tuple[str, ...]
    knobs: dict[str, tuple[float, float]]
    weights: dict[str, float]
    time_share: float


STAGES = (
    Stage(
        systems=("verl", "divided", "context"),
        knobs={
            "cluster.kv_share": (0.3, 1.0),  # Colocated training state takes memory, too.
            "requests.sigma": (0.5, 1.15),
            "requests.correlation": (0.7, 0.96),
            "times.memory_efficiency": (0.3, 0.8),
            "times.step_overhead_s": (0.002, 0.04),
            "times.prefill_efficiency": (0.01, 0.4),  # What is preempted is computed again.
        },
        weights={"divided": 4, "context": 4, "verl_rollout_s": 1, "verl_tail_s": 0.5},
        time_share=0.65,
    ),
    Stage(
        systems=("verl", "verl_grouped_sd", "seer"),
        knobs={
            "times.draft_overhead_s": (0.0002, 0.1),
            "times.draft_overhead_per_token_s": (1e-7, 2e-4),
        },
        weights={"full": 4, "seer_gain": 2, "seer_tail_s": 0.1},
        time_share=0.35,
    ),
)
SHORT_CHUNKS = {"qwen2_vl_72b": {"cluster.chunk_size": (1024, 8192)}}
"""The paper's 8k tokens would be one chunk for most requests of this workload, whose mean is 7.6k; it says no other."""
LOGARITHMIC = {
    "cluster.chunk_size",
    "times.prefill_efficiency",
    "times.step_overhead_s",
    "times.draft_overhead_s",
    "times.draft_overhead_per_token_s",
}


def measure(workload: Workload, stage: Stage, seeds: tuple[int, ...]) -> dict[str, float]:
    """The figures of a stage's systems, as means over seeds."""
    rows = []
    for seed in seeds:
        requests = draw_requests(workload, seed)
        runs = {name: simulate(workload, SYSTEMS[name], requests, seed=seed) for name in stage.systems}
        base = runs["verl"].rollout_time_s
        row = {GAINS[name]: base / result.rollout_time_s for name, result in runs.items() if name in GAINS}
        row |= {"verl_rollout_s": base, "verl_tail_s": runs["verl"].tail_time_s}
        if "seer" in runs:
            row["seer_tail_s"] = runs["seer"].tail_time_s
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


GAINS = {
    "divided": "divided",
    "context": "context",
    "seer": "full",
    "verl_grouped_sd": "seer_gain",
}


def paper_figures(workload: Workload) -> dict[str, float]:
    """What the paper reports, by the names of `measure`."""
    return {**workload.paper["breakdown"], **workload.paper["sd_strategies"], **workload.paper["tail"]}


def changed(workload: Workload, knobs: dict[str, float]) -> Workload:
    """The workload with these values."""
    values: dict[str, int | float] = dict(knobs)
    if "cluster.chunk_size" in values:
        values["cluster.chunk_size"] = 256 * round(values["cluster.chunk_size"] / 256)
    if "cluster.kv_share" in values:
        full = workload.constants["cluster.kv_bytes_per_rank"].value
        values["cluster.kv_bytes_per_rank"] = values.pop("cluster.kv_share") * full
    return workload.with_values(values, note="fitted")


def search(
    workload: Workload, stage: Stage, minutes: float, rng: np.random.Generator, wide_share: float
) -> dict[str, float]:
    """The best values found in the time, of which `wide_share` goes to points anywhere in the box."""
    paper, names = paper_figures(workload), list(stage.knobs)
    best, best_point, best_knobs, tries = math.inf, rng.random(len(names)), {}, 0
    started = time.monotonic()
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1 or not best_knobs:
        is_wide = share < wide_share or not best_knobs
        width = 0.25 * (1 - share) + 0.02
        moved = rng.random(len(names)) < 0.6
        point = np.clip(best_point + moved * width * rng.standard_normal(len(names)), 0, 1)
        point = rng.random(len(names)) if is_wide else point
        knobs = {}
        for place, name in zip(point, names, strict=True):
            low, high = stage.knobs[name]
            knobs[name] = float(low * (high / low) ** place if name in LOGARITHMIC else low + place * (high - low))
        tries += 1
        try:
            figures = measure(changed(workload, knobs), stage, FIT_SEEDS[: 1 if is_wide else 2])
        except ConfigError as error:  # Such as too little memory for the longest request.
            print("refused:", error, flush=True)
            continue
        loss = sum(
            weight * math.log(max(figures[name], 1e-3) / paper[name]) ** 2 for name, weight in stage.weights.items()
        )
        if loss < best or (not is_wide and share < wide_share + 0.05 and loss < 1.1 * best):
            best, best_point, best_knobs = loss, point, knobs
            print(
                f"{share:.2f} try {tries} loss {loss:.4f}",
                {k: f"{v:.4g}" for k, v in (figures | knobs).items()},
                flush=True,
            )
    return best_knobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wide", type=float, default=0.35, help="share of the time for points anywhere in the boxes")
    parser.add_argument("--stages", default="1,2", help="which; the constants of the other one stay")
    options = parser.parse_args()
    workload = load_workload(options.workload).scaled(options.scale)
    rng, found, figures = np.random.default_rng(0), {}, {}
    for number in map(int, options.stages.split(",")):
        stage = STAGES[number - 1]
        if number == 1:
            stage = replace(stage, knobs=stage.knobs | SHORT_CHUNKS.get(options.workload, {}))
        knobs = search(workload, stage, options.minutes * stage.time_share, rng, options.wide)
        workload = changed(workload, knobs)
        found |= knobs
        figures |= measure(workload, stage, FIT_SEEDS)
    paper = paper_figures(workload)
    result = {
        "workload": options.workload,
        "scale": options.scale,
        "seeds": FIT_SEEDS,
        "constants": found,
        "figures": {name: {"simulated": value, "paper": paper[name]} for name, value in figures.items()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
