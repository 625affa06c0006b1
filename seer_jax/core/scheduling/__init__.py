"""Scheduling policies by the names that the configuration uses."""

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.errors import ConfigError
from seer_jax.core.scheduling.base import Decision, SchedulingPolicy
from seer_jax.core.scheduling.group_round_robin import GroupRoundRobinPolicy
from seer_jax.core.scheduling.seer import SeerPolicy

__all__ = ["Decision", "GroupRoundRobinPolicy", "SchedulingPolicy", "SeerPolicy", "make_policy"]

POLICY_NAMES = ("seer", "group_round_robin")


def make_policy(name: str, config: RolloutConfig) -> SchedulingPolicy:
    """Make the scheduling policy of a rollout.

    Args:
        name: One of `POLICY_NAMES`; not read from `config`, since a comparison runs several over one configuration.
        config: Settings of the policies.

    Raises:
        ConfigError: If there is no such policy.
    """
    match name:
        case "seer":
            return SeerPolicy(
                chunk_size=config.chunk_size,
                starvation_interval=config.starvation_interval,
                prefetch_chunks=config.prefetch_chunks,
            )
        case "group_round_robin":
            return GroupRoundRobinPolicy()
        case _:
            raise ConfigError("rollout.policy", f"no policy {name!r}", "one of " + ", ".join(POLICY_NAMES))
