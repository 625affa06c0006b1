"""What could make rollout faster than Seer and stay strictly on-policy: options of the real policy, and bounds.

Every value is Seer's time over the option's on the same lengths and seed, so above 1 is faster.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.errors import ProtocolError
from seer_jax.core.scheduling import switched_on
from seer_jax.sim.drafting import emitted_moments
from seer_jax.sim.roofline import RooflineStepTimes
from seer_jax.sim.simulation import SimRequests, SimResult
from seer_jax.sim.systems import SYSTEMS, System, draw_requests, simulate
from seer_jax.sim.workloads import Workload

LOW_CORRELATION = 0.57
"""Of the lengths of a group in real rollouts of AIME problems by a distilled 1.5B model (design/simulation.md)."""
WIDTH, WIDE_SEQS = 4, 8
"""Chips of joined instances over those of one, and requests per rank up to which instances join."""
SPECULATION = "speculation"
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "a_posterior": {"length_estimator": "posterior"},
    "b_chunk_2k": {"chunk_size": 2048},
    "b_chunk_1k": {"chunk_size": 1024},
    "b_adaptive_chunk": {"min_chunk_size": 512},
    "d_backfill": {"backfill_depth": 32},
    "e_tail_priority": {"tail_priority": True},
    "e_trees": {SPECULATION: "grouped_tree"},
    "trees_chunk_2k": {SPECULATION: "grouped_tree", "chunk_size": 2048},
    "trees_chunk_2k_adaptive": {SPECULATION: "grouped_tree", "chunk_size": 2048, "min_chunk_size": 512},
    "all": {
        SPECULATION: "grouped_tree",
        "length_estimator": "posterior",
        "chunk_size": 2048,
        "min_chunk_size": 512,
        "backfill_depth": 32,
        "tail_priority": True,
    },
}
"""Settings of `RolloutConfig`, and of drafting; the letters are those of issue C."""


def compare_options(workload: Workload, seed: int) -> tuple[dict[str, float], Counter[str]]:
    """Gains over Seer of every option, of bounds that no policy can pass, and how often options fired.

    Returns:
        By name: options of `OPTIONS` and, with the suffix "_low", the same at a correlation of `LOW_CORRELATION`;
        - "bound_a_order": longest first by true lengths;
        - "bound_c_prompts": prompts take no KV at all, as if all were shared;
        - "bound_f_wide": instances with few requests have `WIDTH` times the chips, at once and for free;
        - "bound_g_idle": share of instance time that is idle, which other work could fill;
        - "bound_work": over `least_time_s`; nothing that keeps hardware, model and drafts gets there;
        - "bound_no_tail": as if the tail took no time.

    Raises:
        ProtocolError: If an option that is on fired in no run: it was not tested then.
    """
    values: dict[str, float] = {}
    fired: Counter[str] = Counter()
    for suffix, chosen in (("", workload), ("_low", workload.with_values({"requests.correlation": LOW_CORRELATION}))):
        requests = draw_requests(chosen, seed)
        seer = simulate(chosen, SYSTEMS["seer"], requests, seed=seed)
        for name, options in OPTIONS.items():
            result = simulate(chosen, with_options(name, options), requests, seed=seed)
            values[name + suffix] = seer.rollout_time_s / result.rollout_time_s
            fired.update(result.firings)
        if not suffix:
            values |= _bounds(chosen, requests, seer, seed)
    silent = {option for options in OPTIONS.values() for option in _switched_on(options)} - fired.keys()
    if silent:
        raise ProtocolError(f"{workload.name}, seed {seed}: {', '.join(sorted(silent))} never fired, so was not tested")
    return values, fired


def with_options(name: str, options: Mapping[str, Any]) -> System:
    """Seer with settings beyond the paper."""
    settings = dict(options)
    speculation = settings.pop(SPECULATION, "grouped")
    return System(label=f"Seer + {name}", policy="seer", speculation=speculation, options=settings)


def _switched_on(options: Mapping[str, Any]) -> tuple[str, ...]:
    settings = {"chunk_size": 8192, **options}
    trees = ("grouped_tree",) if settings.pop(SPECULATION, "grouped") == "grouped_tree" else ()
    return (*switched_on(RolloutConfig(**settings)), *trees)


@dataclass(frozen=True)
class WideTailTimes:
    """Step times as if idle instances joined a small batch at once and for free: option (f), at its best.

    Attributes:
        normal: Of one instance.
        wide: Of as many as join.
        most_seqs: Requests of an instance up to which they do.
    """

    normal: RooflineStepTimes
    wide: RooflineStepTimes
    most_seqs: int

    def _of(self, num_seqs: int) -> RooflineStepTimes:
        return self.wide if num_seqs <= self.most_seqs else self.normal

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        """See `StepTimeModel`."""
        return self._of(num_seqs).plain_step_s(num_seqs, mean_context)

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        """See `StepTimeModel`."""
        return self._of(num_seqs).verify_step_s(num_seqs, num_tokens, mean_context)

    def prefill_s(self, num_tokens: int, start: int = 0) -> float:
        """See `InstanceTimes`."""
        return self.normal.prefill_s(num_tokens, start)


def _bounds(workload: Workload, requests: SimRequests, seer: SimResult, seed: int) -> dict[str, float]:
    oracle = System(label="oracle order", policy="oracle", speculation="grouped")
    free = workload.with_values({"requests.prompt_tokens": 1})
    no_prompts = SimRequests.of(free, requests.lengths)
    times = workload.times
    wide = WideTailTimes(
        normal=times,
        wide=replace(times, num_chips=WIDTH * times.num_chips),
        most_seqs=WIDE_SEQS * workload.ranks_per_instance,
    )
    runs = {
        "bound_a_order": simulate(workload, oracle, requests, seed=seed),
        "bound_c_prompts": simulate(free, SYSTEMS["seer"], no_prompts, seed=seed),
        "bound_f_wide": simulate(workload, SYSTEMS["seer"], requests, seed=seed, times=wide),
    }
    bounds = {name: seer.rollout_time_s / run.rollout_time_s for name, run in runs.items()}
    all_s = workload.num_instances * seer.rollout_time_s
    return bounds | {
        "bound_work": seer.rollout_time_s / least_time_s(workload, requests),
        "bound_no_tail": seer.rollout_time_s / (seer.rollout_time_s - seer.tail_time_s),
        "bound_g_idle": 1 - seer.counters.busy_s / all_s,
    }


def least_time_s(workload: Workload, requests: SimRequests) -> float:
    """No rollout of these requests is faster: seconds.

    The greater of two times. All tokens at the best rate of full instances, in which every request is in the middle of
    its life and has all siblings to draft from; and the longest request alone on an instance. Drafts have the length
    that is best for each.
    """
    lengths, times, spec = requests.lengths[requests.lengths > 0], workload.times, workload.speculation
    # A request of length L holds L / 2 tokens in the mean and lives in proportion to L.
    context = workload.prompt_tokens + float((lengths.astype(np.float64) ** 2).sum() / (2 * lengths.sum()))
    ranks = workload.ranks_per_instance
    fits = min(workload.max_num_seqs, int(ranks * workload.kv_tokens_per_rank / context))
    alpha = spec.acceptance_probability(workload.group_size - 1)
    emitted = emitted_moments(np.array([alpha]), spec.gamma_max)[0][:, 0]

    def best_rate(num_seqs: int, mean_context: float) -> float:
        rates = [num_seqs / times.plain_step_s(num_seqs, mean_context)]
        for gamma in range(1, spec.gamma_max + 1):
            step_s = times.verify_step_s(num_seqs, num_seqs * (1 + gamma), mean_context)
            rates.append(num_seqs * float(emitted[gamma]) / float(step_s))
        return max(rates)

    rate = max(best_rate(size, context) for size in range(1, fits + 1))
    longest = int(lengths.max())
    alone_s = longest / best_rate(1, workload.prompt_tokens + longest / 2)
    return max(float(lengths.sum()) / (workload.num_instances * rate), alone_s)
