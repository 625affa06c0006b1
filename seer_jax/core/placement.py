"""Where a chunk runs. The driver's own reservations are the telemetry: exact, immediate and the same on replay."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId

LOAD_STEPS = 16
"""Steps of an instance's load within which a chunk goes where siblings have its prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """KV that a chunk needs.

    Attributes:
        group_id: Its group.
        num_tokens: Tokens of the request when the chunk ends, prompt included.
        num_shared_tokens: Leading ones of them that running siblings can have in common; 0 = none.
    """

    group_id: int
    num_tokens: int
    num_shared_tokens: int = 0

    def pages(self, page_size: int) -> tuple[int, int]:
        """Pages of all tokens, and those of them that hold nothing but shared tokens."""
        return pages_for_tokens(self.num_tokens, page_size), self.num_shared_tokens // page_size


@dataclass(kw_only=True, eq=False, slots=True)
class InstanceLoad:
    """What the driver has sent to an instance and not got back.

    Mirrors the instance's own admission (`core.batching`): a chunk starts when a slot is free and its pages are, else
    it queues there, by priority; the first in the queue that does not fit blocks those behind it.

    Attributes:
        info: What the instance can hold.
        in_flight: Its chunks, running or queued there.
        queued: Those of them that wait for a slot or for pages, in order.
        num_reserved_pages: Pages of the running ones, those that siblings share counted once.
        num_sharing: Running chunks of each group that shares pages here.
    """

    info: InstanceInfo
    in_flight: dict[RequestId, RequestChunk] = field(default_factory=dict)
    queued: list[RequestId] = field(default_factory=list)
    num_reserved_pages: int = 0
    num_sharing: dict[int, int] = field(default_factory=dict)

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt plus response that the instance can finish when it is otherwise empty."""
        return min(self.info.max_model_len, self.info.num_total_pages * self.info.page_size)

    @property
    def num_free_pages(self) -> int:
        """Pages that no running chunk has reserved."""
        return self.info.num_total_pages - self.num_reserved_pages

    @property
    def is_full(self) -> bool:
        """Whether all slots are taken by running chunks."""
        return len(self.in_flight) - len(self.queued) >= self.info.max_num_seqs

    def can_start(self, chunk: RequestChunk) -> bool:
        """Whether a chunk would start at once."""
        return not self.queued and self._has_room(chunk)

    def add(self, chunk: RequestChunk) -> None:
        """Note a chunk that is sent."""
        starts = self.can_start(chunk)
        self.in_flight[chunk.request_id] = chunk
        if starts:
            self._start(chunk)
        else:
            bisect.insort(self.queued, chunk.request_id, key=lambda request_id: self.in_flight[request_id].priority)

    def remove(self, request_id: RequestId) -> None:
        """Note that a chunk came back; results may overtake each other, so it may count as queued still."""
        if request_id in self.queued:
            self.queued.remove(request_id)
        else:
            self._end(self.in_flight[request_id])
        del self.in_flight[request_id]
        while self.queued and self._has_room(chunk := self.in_flight[self.queued[0]]):
            del self.queued[0]
            self._start(chunk)

    def copy(self) -> "InstanceLoad":
        """Copy the bookkeeping; chunks are immutable and shared."""
        return replace(
            self, in_flight=dict(self.in_flight), queued=list(self.queued), num_sharing=dict(self.num_sharing)
        )

    def _has_room(self, chunk: RequestChunk) -> bool:
        return not self.is_full and self._num_own_pages(chunk) <= self.num_free_pages

    def _num_own_pages(self, chunk: RequestChunk) -> int:
        """Pages of a chunk beside those that a running sibling has for it."""
        has_sibling = chunk.request_id.group_id in self.num_sharing
        return chunk.num_reserved_pages - (chunk.num_shared_pages if has_sibling else 0)

    def _start(self, chunk: RequestChunk) -> None:
        if not chunk.num_reserved_pages:
            return
        self.num_reserved_pages += self._num_own_pages(chunk)
        if chunk.num_shared_pages:
            group_id = chunk.request_id.group_id
            self.num_sharing[group_id] = self.num_sharing.get(group_id, 0) + 1

    def _end(self, chunk: RequestChunk) -> None:
        if not chunk.num_reserved_pages:
            return
        if chunk.num_shared_pages:
            group_id = chunk.request_id.group_id
            self.num_sharing[group_id] -= 1
            if not self.num_sharing[group_id]:
                del self.num_sharing[group_id]
        self.num_reserved_pages -= self._num_own_pages(chunk)


def choose_instance(
    loads: Iterable[InstanceLoad], footprint: Footprint, last_instance_id: int | None, prefetch_chunks: int
) -> InstanceLoad | None:
    """Choose the least loaded instance with room for a chunk's whole KV footprint (Algorithm 2, instance choice).

    An instance that can start the chunk at once goes before one where it would queue. Then the shorter queue, the
    instance that ran the request last (its KV may still be there), the smaller share of reserved pages, the fewer
    chunks, the smaller id. Where a prompt can be shared, a sixteenth of the pages more is no reason to leave siblings.

    Args:
        loads: The live instances.
        footprint: Of the chunk.
        last_instance_id: Where the request's previous chunk was; None if there was none.
        prefetch_chunks: Chunks that may queue at an instance.

    Returns:
        The instance, or None if the chunk can neither start nor queue anywhere now.
    """
    best, best_key, page_size, num_all, num_shared = None, None, 0, 0, 0
    group_id, num_tokens = footprint.group_id, footprint.num_tokens
    for load in loads:  # Runs for every instance at every decision, hence no calls for what most of them fail.
        info, num_queued = load.info, len(load.queued)
        if info.page_size != page_size:
            page_size, (num_all, num_shared) = info.page_size, footprint.pages(info.page_size)
        has_sibling = num_shared > 0 and group_id in load.num_sharing
        num_pages = num_all - num_shared if has_sibling else num_all
        waits = num_queued > 0 or num_pages > info.num_total_pages - load.num_reserved_pages or load.is_full
        if waits and num_queued >= prefetch_chunks:
            continue
        if num_tokens > info.max_model_len or num_all > info.num_total_pages:
            continue
        key = (
            waits,
            num_queued,
            info.instance_id != last_instance_id,
            load.num_reserved_pages * LOAD_STEPS // info.num_total_pages if num_shared else 0,
            not has_sibling,
            load.num_reserved_pages / info.num_total_pages,
            len(load.in_flight),
            info.instance_id,
        )
        if best_key is None or key < best_key:
            best, best_key = load, key
    return best
