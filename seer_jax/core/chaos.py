"""Seeded faults: what a rollout must survive with the same tokens."""

import random
from collections.abc import Mapping

from seer_jax.config.schema import ChaosConfig
from seer_jax.core.placement import InstanceLoad

KILL_UNTIL = 0.8
"""Instances die while less than this share of the requests has finished, so that there is something to lose."""


class Chaos:
    """Says when which fault happens, the same for the same settings and course of the rollout."""

    def __init__(self, config: ChaosConfig) -> None:
        """Draw nothing yet."""
        self._config = config
        self._rng = random.Random(config.seed)
        self._kill_at: list[int] = []
        self._kill_owner_at: list[int] = []
        self._killed: set[int] = set()
        self.num_dropped = 0
        """Messages lost since the caller last set it."""

    def start(self, num_requests: int) -> None:
        """Choose after how many finished requests instances and pool owners are killed.

        Args:
            num_requests: Of the rollout that begins.
        """
        last = int(KILL_UNTIL * num_requests)
        self._kill_at = sorted(self._rng.randint(0, last) for _ in range(self._config.kill_instance))
        self._kill_owner_at = sorted(self._rng.randint(0, last) for _ in range(self._config.kill_pool_owner))

    def victims(self, num_finished: int, loads: Mapping[int, InstanceLoad]) -> list[int]:
        """Choose instances to kill now: at most one at a time, and only one that runs something.

        Args:
            num_finished: Requests finished so far.
            loads: Live instances and what is in flight there.
        """
        # One that was killed stays among the loads until its loss is noticed.
        busy = [
            instance_id for instance_id, load in loads.items() if load.in_flight and instance_id not in self._killed
        ]
        if not busy or not self._kill_at or num_finished < self._kill_at[0]:
            return []
        self._kill_at.pop(0)
        victim = self._rng.choice(busy)
        self._killed.add(victim)
        return [victim]

    def kills_pool_owner(self, num_finished: int) -> bool:
        """Whether an owner of the shared KV pool dies now, `num_finished` requests having finished."""
        is_due = bool(self._kill_owner_at) and num_finished >= self._kill_owner_at[0]
        if is_due:
            self._kill_owner_at.pop(0)
        return is_due

    def drops_message(self) -> bool:
        """Whether the message in hand is lost."""
        is_lost = self._config.drop_message > 0 and self._rng.random() < self._config.drop_message
        self.num_dropped += is_lost
        return is_lost


def delay_s(config: ChaosConfig, place: int, step_s: float) -> float:
    """Seconds that the instance in a place is to idle after a step of `step_s`; the one in the first is slow."""
    return (config.slow_instance - 1) * step_s if place == 0 else 0.0
