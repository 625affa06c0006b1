"""Scheduling policies and length estimators by the names that the configuration uses."""

from collections.abc import Mapping

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.context import GroupMaxEstimator, LengthEstimator, OracleEstimator
from seer_jax.core.errors import ConfigError
from seer_jax.core.posterior import PosteriorEstimator
from seer_jax.core.scheduling.base import Decision, SchedulingPolicy
from seer_jax.core.scheduling.divided import DividedPolicy, OraclePolicy
from seer_jax.core.scheduling.group_round_robin import GroupRoundRobinPolicy
from seer_jax.core.scheduling.seer import SeerPolicy
from seer_jax.core.scheduling.streamrl_oracle import StreamRLOraclePolicy
from seer_jax.core.types import RequestId

__all__ = [
    "Decision",
    "DividedPolicy",
    "GroupRoundRobinPolicy",
    "OraclePolicy",
    "SchedulingPolicy",
    "SeerPolicy",
    "StreamRLOraclePolicy",
    "make_estimator",
    "make_policy",
    "switched_on",
]

POLICY_NAMES = ("seer", "divided", "group_round_robin")
ORACLE_NAMES = ("oracle", "streamrl_oracle")
"""Policies that know true lengths: for simulation only."""


def make_policy(
    name: str, config: RolloutConfig, true_lengths: Mapping[RequestId, int] | None = None
) -> SchedulingPolicy:
    """Make the scheduling policy of a rollout.

    Args:
        name: One of `POLICY_NAMES`; not read from `config`, since a comparison runs several over one configuration. In
            a simulation, one of `ORACLE_NAMES`, too.
        config: Settings of the policies.
        true_lengths: Tokens that each request of the iteration will generate; only a simulation has them.

    Raises:
        ConfigError: If there is no such policy, or it needs true lengths.
    """
    reserving = {
        "chunk_size": config.chunk_size,
        "prefetch_chunks": config.prefetch_chunks,
        "share_prompts": config.share_prompts,
    }
    match name:
        case "seer":
            return SeerPolicy(starvation_interval=config.starvation_interval, **reserving)
        case "divided":
            return DividedPolicy(**reserving)
        case "group_round_robin":
            return GroupRoundRobinPolicy(share_prompts=config.share_prompts)
        case "oracle" | "streamrl_oracle" if true_lengths is None:
            problem = f"{name!r} orders by true lengths, which nobody knows before a rollout has ended"
            raise ConfigError("rollout.policy", problem, "simulate it, or take one of " + ", ".join(POLICY_NAMES))
        case "oracle":
            return OraclePolicy(**reserving)
        case "streamrl_oracle":
            return StreamRLOraclePolicy(true_lengths=true_lengths)
        case _:
            raise ConfigError("rollout.policy", f"no policy {name!r}", "one of " + ", ".join(POLICY_NAMES))


def make_estimator(
    name: str, config: RolloutConfig, true_lengths: Mapping[RequestId, int] | None = None
) -> LengthEstimator:
    """Make the length estimator that goes with a policy.

    Args:
        name: The policy, as in `make_policy`.
        config: Settings of the rollout.
        true_lengths: Tokens that each request of the iteration will generate; only a simulation has them.

    Raises:
        ConfigError: If the policy needs true lengths.
    """
    if name in ORACLE_NAMES:
        if true_lengths is None:
            raise ConfigError("rollout.policy", f"{name!r} needs true lengths", "they exist in simulation only")
        return OracleEstimator(true_lengths)
    if name == "seer" and config.length_estimator == "posterior":
        return PosteriorEstimator()
    return GroupMaxEstimator()


def switched_on(config: RolloutConfig) -> tuple[str, ...]:
    """Name the options that are on as `Decision.fired` does; one that is on and never fires had no effect."""
    options = {"posterior": config.length_estimator == "posterior", "share_prompts": config.share_prompts}
    return tuple(name for name, is_on in options.items() if is_on)
