"""What could make rollout faster than Seer and stay strictly on-policy: options of the real policy, and bounds.

Every value is Seer's time over the option's on the same lengths and seed, so above 1 is faster.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.errors import ProtocolError
from seer_jax.core.scheduling import switched_on
from seer_jax.sim.simulation import SimRequests, SimResult
from seer_jax.sim.systems import SYSTEMS, System, draw_requests, simulate
from seer_jax.sim.workloads import Workload

LOW_CORRELATION = 0.57
"""Of the lengths of a group in real rollouts of AIME problems by a distilled 1.5B model (design/simulation.md)."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "posterior": {"length_estimator": "posterior"},
    "chunk_2k": {"chunk_size": 2048},
    "chunk_1k": {"chunk_size": 1024},
    "adaptive_chunk": {"min_chunk_size": 512},
    "backfill": {"backfill_depth": 32},
    "tail_priority": {"tail_priority": True},
    "chunk_1k_backfill": {"chunk_size": 1024, "backfill_depth": 32},
    "all": {
        "length_estimator": "posterior",
        "chunk_size": 1024,
        "min_chunk_size": 256,
        "backfill_depth": 32,
        "tail_priority": True,
    },
}
"""Settings of `RolloutConfig`."""


def compare_options(workload: Workload, seed: int) -> tuple[dict[str, float], Counter[str]]:
    """Gains over Seer of every option, of bounds that no policy can pass, and how often options fired.

    Returns:
        By name: options of `OPTIONS` and, with the suffix "_low", the same at a correlation of `LOW_CORRELATION`;
        "bound_order": longest first by true lengths; "bound_prompts": prompts take no KV at all, as if all were shared;
        "bound_no_tail": nothing runs but what runs before the tail (wider meshes for the last requests can save no
        more); "bound_idle": share of all instance time in which an instance is idle, which work that is overlapped
        with the tail could fill.

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
    return System(label=f"Seer + {name}", policy="seer", speculation="grouped", options=options)


def _switched_on(options: Mapping[str, Any]) -> tuple[str, ...]:
    return switched_on(RolloutConfig(**{"chunk_size": 8192, **options}))


def _bounds(workload: Workload, requests: SimRequests, seer: SimResult, seed: int) -> dict[str, float]:
    oracle = System(label="oracle order", policy="oracle", speculation="grouped")
    free = workload.with_values({"requests.prompt_tokens": 1})
    no_prompts = SimRequests.of(free, requests.lengths)
    num_instances = workload.num_instances
    return {
        "bound_order": seer.rollout_time_s / simulate(workload, oracle, requests, seed=seed).rollout_time_s,
        "bound_prompts": seer.rollout_time_s / simulate(free, SYSTEMS["seer"], no_prompts, seed=seed).rollout_time_s,
        "bound_no_tail": seer.rollout_time_s / (seer.rollout_time_s - seer.tail_time_s),
        "bound_idle": 1 - seer.counters.busy_s / (num_instances * seer.rollout_time_s),
    }
