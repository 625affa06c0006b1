"""What a scheduling policy is: it looks at the buffer and the instances and names the next chunk to start."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.request import RolloutRequest

PROBE_PRIORITY, REST_PRIORITY = 0, 1
"""Seer's two classes of chunks; policies that know no probes give all the first."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Decision:
    """One chunk to start now.

    Attributes:
        request: A waiting request.
        instance_id: Where its next chunk runs.
        max_chunk_tokens: Tokens that the chunk may generate.
        num_reserved_pages: Pages set aside for it at the instance; 0 = it grows page by page and may be preempted.
        priority: Smaller runs first among chunks queued at the instance.
    """

    request: RolloutRequest
    instance_id: int
    max_chunk_tokens: int
    num_reserved_pages: int
    priority: int


@runtime_checkable
class SchedulingPolicy(Protocol):
    """Decides which request runs where. Holds settings only; all state is in the buffer and the loads."""

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Decide the next chunk; changes nothing. The driver carries it out and asks again until None.

        Args:
            buffer: Waiting and running requests.
            loads: Live instances by id; may be empty.

        Returns:
            A decision, or None if nothing can start before the next event.
        """
        ...
