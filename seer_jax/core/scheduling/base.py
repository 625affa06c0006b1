"""What a scheduling policy is: it looks at the buffer and the instances and names the next chunk to start."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import Footprint, InstanceLoad, choose_instance
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
        num_shared_pages: See `RequestChunk`.
        priority: Smaller runs first among chunks queued at the instance.
        fired: Options without which this decision would have been another, by their names in the configuration.
    """

    request: RolloutRequest
    instance_id: int
    max_chunk_tokens: int
    num_reserved_pages: int
    priority: int
    num_shared_pages: int = 0
    fired: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReservingPolicy:
    """What policies of divided rollout have in common: a chunk runs where its whole KV footprint fits.

    Attributes:
        chunk_size: Tokens generated per chunk.
        prefetch_chunks: Chunks that an instance accepts beyond its slots.
        share_prompts: Whether requests of a group that run on one instance have the pages of their prompt in common.
    """

    chunk_size: int
    prefetch_chunks: int
    share_prompts: bool = False

    def place(self, request: RolloutRequest, loads: Mapping[int, InstanceLoad], priority: int) -> Decision | None:
        """Start a request's next chunk on the least loaded instance; None if it fits nowhere now."""
        max_chunk_tokens = min(self.chunk_size, request.remaining_tokens)
        footprint = Footprint(
            group_id=request.request_id.group_id,
            num_tokens=request.num_tokens + max_chunk_tokens,
            # A request computes its prompt's last token itself, to draw from it.
            num_shared_tokens=request.num_prompt_tokens - 1 if self.share_prompts else 0,
        )
        load = choose_instance(loads.values(), footprint, request.instance_id, self.prefetch_chunks)
        if load is None:
            return None
        num_reserved, num_shared = footprint.pages(load.info.page_size)
        return Decision(
            request=request,
            instance_id=load.info.instance_id,
            max_chunk_tokens=max_chunk_tokens,
            num_reserved_pages=num_reserved,
            num_shared_pages=num_shared,
            priority=priority,
            fired=("share_prompts",) if num_shared and footprint.group_id in load.num_sharing else (),
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
