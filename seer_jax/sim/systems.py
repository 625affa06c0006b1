"""The systems that the paper compares, by name: a policy, a length estimator and a way to draft for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seer_jax.config.schema import RolloutConfig
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError
from seer_jax.core.scheduling import make_estimator, make_policy
from seer_jax.core.types import RequestId
from seer_jax.sim.batch import InstanceTimes
from seer_jax.sim.drafting import GroupedSpeculation, SpeculationModel, VanillaSpeculation
from seer_jax.sim.lengths import sample_lengths
from seer_jax.sim.simulation import SimCluster, SimRequests, SimResult, Simulation
from seer_jax.sim.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class System:
    """One bar of a figure.

    Attributes:
        label: As the paper calls it.
        policy: Of `core.scheduling`.
        speculation: "off"; "vanilla": the workload's own kind without context; "grouped": Seer's lines; "grouped_tree":
            trees where they pay.
        options: Settings of `RolloutConfig` beyond the paper.
    """

    label: str
    policy: str
    speculation: str = "off"
    options: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS = {
    "verl": System(label="veRL", policy="group_round_robin"),
    "verl_sd": System(label="veRL + vanilla SD", policy="group_round_robin", speculation="vanilla"),
    "verl_grouped_sd": System(label="veRL + grouped SD", policy="group_round_robin", speculation="grouped"),
    "streamrl_oracle": System(label="StreamRL-Oracle", policy="streamrl_oracle"),
    "streamrl_oracle_sd": System(label="StreamRL-Oracle + vanilla SD", policy="streamrl_oracle", speculation="vanilla"),
    "divided": System(label="divided rollout", policy="divided"),
    "context": System(label="+ context", policy="seer"),
    "oracle": System(label="oracle order", policy="oracle"),
    "seer": System(label="Seer", policy="seer", speculation="grouped"),
}


def find_system(name: str) -> System:
    """Look a system up.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in SYSTEMS:
        raise ConfigError("system", f"no system {name!r}", did_you_mean(name, SYSTEMS))
    return SYSTEMS[name]


def draw_requests(workload: Workload, seed: int) -> SimRequests:
    """The requests of an iteration: the same for every system, so that systems are compared on equal lengths."""
    rng = np.random.default_rng(seed)
    return SimRequests.of(workload, sample_lengths(workload.lengths, workload.num_groups, workload.group_size, rng))


def simulate(
    workload: Workload,
    system: System,
    requests: SimRequests,
    *,
    seed: int = 0,
    times: InstanceTimes | None = None,
    stop_after: int | None = None,
    record: bool = False,
) -> SimResult:
    """Simulate one iteration.

    Args:
        workload: Cluster, model and costs.
        system: What runs there.
        requests: What is generated.
        seed: Of the drafts' luck.
        times: Step times instead of the workload's.
        stop_after: Requests after which the rest is cut off.
        record: Keep the course of the rollout.
    """
    config = RolloutConfig(
        **{"chunk_size": workload.chunk_size, "prefetch_chunks": 0, "share_prompts": False, **system.options}
    )
    lengths = {
        RequestId(group, index): int(length)
        for group, row in enumerate(requests.lengths)
        for index, length in enumerate(row)
        if length
    }
    progress = np.zeros(requests.lengths.shape)
    speculation: SpeculationModel | None = None
    if system.speculation in ("grouped", "grouped_tree"):
        trees = system.speculation == "grouped_tree"
        speculation = GroupedSpeculation(workload.speculation, times or workload.times, progress, trees=trees)
    elif system.speculation == "vanilla":
        speculation = VanillaSpeculation(workload.speculation.vanilla, workload.times)
    result = Simulation(
        cluster=SimCluster.of(workload, requests, times),
        requests=requests,
        policy=make_policy(system.policy, config, lengths),
        estimator=make_estimator(system.policy, config, lengths),
        speculation=speculation,
        progress=progress if speculation is not None else None,
        seed=seed,
        stop_after=stop_after,
        record=record,
    ).run()
    if isinstance(speculation, GroupedSpeculation) and speculation.num_tree_plans:
        result.firings["grouped_tree"] = speculation.num_tree_plans
    return result
