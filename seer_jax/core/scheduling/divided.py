"""Divided rollout in a fixed order of requests: what Seer's context is compared with, from below and from above."""

from collections.abc import Mapping
from dataclasses import dataclass

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.scheduling.base import PROBE_PRIORITY, Decision, ReservingPolicy


@dataclass(frozen=True, kw_only=True)
class DividedPolicy(ReservingPolicy):
    """Divided rollout without length context (the paper's "no-context"): chunked and reserved like Seer, no probes.

    The paper gives no order. Here it is that of submission, whatever a request has generated: what was begun is
    finished before something new is, so few paused caches pile up.
    """

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick the first to arrive; it blocks those behind it if it fits nowhere."""
        request = buffer.first_arrived()
        return None if request is None else self.place(request, loads, PROBE_PRIORITY)


@dataclass(frozen=True, kw_only=True)
class OraclePolicy(ReservingPolicy):
    """The upper bound of what length context can give: the longest of all first, no probes.

    Longest by the driver's estimator, which must be an `OracleEstimator`. For tests and simulation: nobody knows the
    true lengths of a real rollout.
    """

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick the longest; it blocks those behind it if it fits nowhere."""
        request = buffer.longest()
        return None if request is None else self.place(request, loads, PROBE_PRIORITY)
