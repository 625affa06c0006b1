"""What a scheduling policy is: it looks at the buffer and the instances and names the next chunk to start."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.kv.page_pool import pages_for_tokens
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
        fired: Options without which this decision would have been another, by their names in the configuration.
    """

    request: RolloutRequest
    instance_id: int
    max_chunk_tokens: int
    num_reserved_pages: int
    priority: int
    fired: tuple[str, ...] = ()


def start_reserved(request: RolloutRequest, load: InstanceLoad, max_chunk_tokens: int, priority: int) -> Decision:
    """Decide to start a chunk with its whole KV footprint reserved."""
    return Decision(
        request=request,
        instance_id=load.info.instance_id,
        max_chunk_tokens=max_chunk_tokens,
        num_reserved_pages=pages_for_tokens(request.num_tokens + max_chunk_tokens, load.info.page_size),
        priority=priority,
    )


@runtime_checkable
class SchedulingPolicy(Protocol):
    """Decides which request runs where.

    Holds settings, and at most what follows from them; all state is in the buffer and the loads.
    """

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Decide the next chunk; changes nothing. The driver carries it out and asks again until None.

        Args:
            buffer: Waiting and running requests.
            loads: Live instances by id; may be empty.

        Returns:
            A decision, or None if nothing can start before the next event.
        """
        ...
