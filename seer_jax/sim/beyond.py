"""What could make rollout faster than Seer and stay strictly on-policy: options of the real policy, and bounds.

Every value is Seer's time over the option's on the same lengths and seed, so above 1 is faster.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.scheduling import switched_on
from seer_jax.sim.drafting import emitted_moments
from seer_jax.sim.roofline import RooflineStepTimes
from seer_jax.sim.simulation import SimRequests, SimResult
from seer_jax.sim.systems import SYSTEMS, System, draw_requests, simulate
from seer_jax.sim.wide import can_widen, widen
from seer_jax.sim.workloads import Workload

LOW_CORRELATION = 0.57
"""Of the lengths of a group in real rollouts of AIME problems by a distilled 1.5B model (design/simulation.md)."""
WIDTH, WIDE_SEQS = 4, 8
"""Chips of joined instances over those of one, and requests per rank up to which instances join."""
BOUND_CHUNKS = (1, 4)
"""Parts of a chunk that the bounds of several options try."""
SPECULATION, WIDEN = "speculation", "widen"
WIDTHS = (2, 4)
"""Instances joined for good, where there are so many."""
ENVELOPE_POINTS = 40
"""Contexts at which the least time of a token is computed."""


def options_of(workload: Workload) -> dict[str, dict[str, Any]]:
    """What is compared: settings of `RolloutConfig`, of drafting and of the mesh; the letters are those of issue C."""
    half, quarter = workload.chunk_size // 2, workload.chunk_size // 4
    posterior = {"length_estimator": "posterior"}
    trees_quarter = {SPECULATION: "grouped_tree", "chunk_size": quarter}
    wide = {width: {WIDEN: width} for width in _widths(workload)}
    return {
        "a_posterior": posterior,
        "b_half_chunk": {"chunk_size": half},
        "b_quarter_chunk": {"chunk_size": quarter},
        "c_shared_prompts": {"share_prompts": True},
        "e_trees": {SPECULATION: "grouped_tree"},
        "trees_quarter_chunk": trees_quarter,
        "posterior_quarter_chunk": posterior | {"chunk_size": quarter},
        "shared_trees_quarter_chunk": {"share_prompts": True} | trees_quarter,
        "all": {"share_prompts": True} | posterior | trees_quarter,
        **{f"f_wide_{width}": option for width, option in wide.items()},
        **{f"wide_{width}_quarter_chunk": option | {"chunk_size": quarter} for width, option in wide.items()},
    }


def compare_options(workload: Workload, seed: int) -> tuple[dict[str, float], Counter[str]]:
    """Gains over Seer of every option, bounds, and how often options fired.

    Returns:
        Values by name, and firings by "workload:option:what". The values are: options of `options_of` and, with the
        suffix "_low", the same at a correlation of `LOW_CORRELATION`;
        - "f_wide_W_room_only": as "f_wide_W" with the least W, if reading the experts got no faster by it;
        - "f_wide_W_verl": what joining does for veRL, over veRL;
        - "bound_a_order": longest first by true lengths;
        - "bound_c_prompts": prompts take no KV at all, as if all were shared;
        - "bound_f_wide": instances with few requests have `WIDTH` times the chips, at once and for free;
        - "bound_abc": the first two at once, with trees and the best of `BOUND_CHUNKS`;
        - "bound_e_drafts": drafting costs nothing, with trees;
        - "bound_g_idle": share of instance time that is idle, which other work could fill;
        - "bound_work": over `least_time_s`; nothing that keeps hardware, instances, model and drafts gets there;
        - "bound_no_tail": as if the tail took no time.
        Bounds of options are simulations of Seer with something that it cannot have.
        A count of 0 means that the option was on and changed nothing: it was not tested.
    """
    values: dict[str, float] = {}
    fired: Counter[str] = Counter()
    for suffix, chosen in (("", workload), ("_low", workload.with_values({"requests.correlation": LOW_CORRELATION}))):
        requests = draw_requests(chosen, seed)
        seer = simulate(chosen, SYSTEMS["seer"], requests, seed=seed)
        for name, options in options_of(chosen).items():
            cluster = widen(chosen, options[WIDEN]) if WIDEN in options else chosen
            result = simulate(cluster, with_options(name, options), requests, seed=seed)
            values[name + suffix] = seer.rollout_time_s / result.rollout_time_s
            counts = result.firings | {
                "chunk_size": abs(result.num_chunks - seer.num_chunks),
                WIDEN: abs(round(result.counters.num_steps - seer.counters.num_steps)),
            }
            fired.update({f"{workload.name}:{name}:{what}": counts.get(what, 0) for what in _switched_on(options)})
        if not suffix:
            values |= _bounds(chosen, requests, seer, seed)
    return values, fired


def with_options(name: str, options: Mapping[str, Any]) -> System:
    """Seer with settings beyond the paper."""
    settings = {key: value for key, value in options.items() if key != WIDEN}
    speculation = settings.pop(SPECULATION, "grouped")
    return System(label=f"Seer + {name}", policy="seer", speculation=speculation, options=settings)


def _widths(workload: Workload) -> list[int]:
    """How many of its instances are joined."""
    return [width for width in WIDTHS if can_widen(workload, width)]


def _switched_on(options: Mapping[str, Any]) -> tuple[str, ...]:
    """What must fire."""
    settings = {"share_prompts": False} | dict(options)  # As `simulate` has it.
    trees = [settings.pop(SPECULATION)] if SPECULATION in settings else []
    wide = [WIDEN] if settings.pop(WIDEN, None) else []
    chunks = ["chunk_size"] if "chunk_size" in settings else []
    return (*switched_on(RolloutConfig(**settings)), *trees, *wide, *chunks)


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
        "bound_a_order": [simulate(workload, oracle, requests, seed=seed)],
        "bound_c_prompts": [simulate(free, SYSTEMS["seer"], no_prompts, seed=seed)],
        "bound_f_wide": [simulate(workload, SYSTEMS["seer"], requests, seed=seed, times=wide)],
    }
    trees = replace(oracle, speculation="grouped_tree")
    sizes = [workload.chunk_size // parts for parts in BOUND_CHUNKS]
    chosen = [replace(trees, options={"chunk_size": size}) for size in sizes]
    runs["bound_abc"] = [simulate(free, system, no_prompts, seed=seed) for system in chosen]
    cheap = workload.with_values({"times.draft_overhead_s": 0.0, "times.draft_overhead_per_token_s": 0.0})
    runs["bound_e_drafts"] = [simulate(cheap, replace(trees, policy="seer"), requests, seed=seed)]
    of_verl = {}
    for width in _widths(workload)[:1]:
        room = widen(workload, width, faster_reads=False)
        runs[f"f_wide_{width}_room_only"] = [simulate(room, SYSTEMS["seer"], requests, seed=seed)]
        clusters = (workload, widen(workload, width))
        verl_s, wide_s = (simulate(w, SYSTEMS["verl"], requests, seed=seed).rollout_time_s for w in clusters)
        of_verl[f"f_wide_{width}_verl"] = verl_s / wide_s
    bounds = {name: max(seer.rollout_time_s / run.rollout_time_s for run in found) for name, found in runs.items()}
    all_s = workload.num_instances * seer.rollout_time_s
    return {
        **bounds,
        **of_verl,
        "bound_work": seer.rollout_time_s / least_time_s(workload, requests),
        "bound_no_tail": seer.rollout_time_s / (seer.rollout_time_s - seer.tail_time_s),
        "bound_g_idle": 1 - seer.counters.busy_s / all_s,
    }


def least_time_s(workload: Workload, requests: SimRequests) -> float:
    """No rollout of these requests, with lines or trees, is faster: seconds.

    The greater of the longest request's time alone on an instance, and of all tokens' at the best mix of batches. A
    token at context c takes an instance at least h(c) seconds: the step's time over the tokens that it emits, with as
    many requests of that context as fit and the best drafts from all siblings. Batches of different contexts can be
    mixed, but tokens and the sum of their contexts are given, so no mix beats N times the lower convex envelope of h at
    the mean context.
    """
    lengths = requests.lengths[requests.lengths > 0].astype(np.float64)
    prompt, limit = workload.prompt_tokens, workload.lengths.limit
    drafts = _drafts(workload)
    contexts = np.linspace(prompt, prompt + limit, ENVELOPE_POINTS)
    room = workload.ranks_per_instance * workload.kv_tokens_per_rank

    def least_s(context: float) -> float:
        most = min(workload.max_num_seqs, math.ceil(room / context))
        return min(_token_s(workload.times, drafts, size, context) for size in range(1, 1 + most))

    least = np.array([least_s(context) for context in contexts.tolist()])
    mean_context = prompt + float((lengths**2).sum() / (2 * lengths.sum()))
    envelope = _convex_envelope(contexts, least, mean_context)
    longest = float(lengths.max())
    alone_s = longest * _token_s(workload.times, drafts, 1, prompt + longest / 2)
    return max(float(lengths.sum()) * envelope / workload.num_instances, alone_s)


def _drafts(workload: Workload) -> list[tuple[float, float]]:
    """Nodes and emitted tokens of every line, and of the tree, that a complete group gives."""
    spec, siblings = workload.speculation, workload.group_size - 1
    alpha = spec.acceptance_probability(siblings)
    emitted = emitted_moments(np.array([alpha]), spec.gamma_max)[0][:, 0].tolist()
    lines = [(float(nodes), length) for nodes, length in enumerate(emitted)][1:]
    return [*lines, (float(spec.tree_nodes), spec.tree_acceptance_length(siblings))]


def _token_s(times: RooflineStepTimes, drafts: Sequence[tuple[float, float]], num_seqs: int, context: float) -> float:
    """Seconds of an instance per token, with the best of these drafts or none."""
    least = times.plain_step_s(num_seqs, context) / num_seqs
    for nodes, length in drafts:
        step_s = float(times.verify_step_s(num_seqs, round(num_seqs * (1 + nodes)), context))
        least = min(least, step_s / (num_seqs * length))
    return least


def _convex_envelope(xs: np.ndarray, ys: np.ndarray, x: float) -> float:
    """The greatest convex function below the points, at `x`: the least chord over it."""
    left, right = xs <= x, xs >= x
    x0, y0 = xs[left][:, None], ys[left][:, None]
    x1, y1 = xs[right][None], ys[right][None]
    share = np.where(x1 > x0, (x - x0) / np.maximum(x1 - x0, 1e-12), 0.0)
    return float((y0 + share * (y1 - y0)).min())
