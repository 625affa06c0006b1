"""Seer's context-aware scheduling of divided rollout (the paper's Algorithm 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.scheduling.base import PROBE_PRIORITY, REST_PRIORITY, Decision, ReservingPolicy


@dataclass(frozen=True, kw_only=True)
class SeerPolicy(ReservingPolicy):
    """Probes first, then the longest estimate; chunk by chunk, with the whole KV footprint reserved.

    The request is chosen before the instance, so one that fits nowhere now blocks those behind it until pages come
    back: the paper's behaviour, and what keeps long requests from being overtaken for ever by short ones.

    Attributes:
        starvation_interval: Every so many decisions one goes to the most underserved group; 0 = never. A group with a
            waiting request is then served within `starvation_interval` x (number of groups) decisions.
    """

    starvation_interval: int

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick a request, then the least loaded instance that has room for its next chunk."""
        if not buffer.waiting:
            return None
        is_forced = self.starvation_interval > 0 and (buffer.num_taken + 1) % self.starvation_interval == 0
        probe = None if is_forced else buffer.shortest_probe()
        request = probe or (buffer.most_underserved() if is_forced else buffer.longest())
        assert request is not None
        decision = self.place(request, loads, PROBE_PRIORITY if request.is_probe else REST_PRIORITY)
        fired = () if decision is None or is_forced or probe else buffer.context.fired(request)
        return decision if not fired else replace(decision, fired=(*decision.fired, *fired))
