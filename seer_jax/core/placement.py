"""Where a chunk runs. The driver's own reservations are the telemetry: exact, immediate and the same on replay."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId


@dataclass(kw_only=True, eq=False, slots=True)
class InstanceLoad:
    """What the driver has sent to an instance and not got back.

    Mirrors the instance's own admission (`core.batching`): a chunk starts when a slot is free and its pages are, else
    it queues there, by priority; the first in the queue that does not fit blocks those behind it.

    Attributes:
        info: What the instance can hold.
        in_flight: Its chunks, running or queued there.
        queued: Those of them that wait for a slot or for pages, in order.
        num_reserved_pages: Sum over the running ones.
    """

    info: InstanceInfo
    in_flight: dict[RequestId, RequestChunk] = field(default_factory=dict)
    queued: list[RequestId] = field(default_factory=list)
    num_reserved_pages: int = 0

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

    def can_start(self, num_pages: int) -> bool:
        """Whether a chunk that reserves so many pages would start at once."""
        return not self.queued and self._has_room(num_pages)

    def add(self, chunk: RequestChunk) -> None:
        """Note a chunk that is sent."""
        starts = self.can_start(chunk.num_reserved_pages)
        self.in_flight[chunk.request_id] = chunk
        if starts:
            self.num_reserved_pages += chunk.num_reserved_pages
        else:
            bisect.insort(self.queued, chunk.request_id, key=lambda request_id: self.in_flight[request_id].priority)

    def remove(self, request_id: RequestId) -> None:
        """Note that a chunk came back; results may overtake each other, so it may count as queued still."""
        if request_id in self.queued:
            self.queued.remove(request_id)
        else:
            self.num_reserved_pages -= self.in_flight[request_id].num_reserved_pages
        del self.in_flight[request_id]
        while self.queued:
            num_pages = self.in_flight[self.queued[0]].num_reserved_pages
            if not self._has_room(num_pages):
                break
            del self.queued[0]
            self.num_reserved_pages += num_pages

    def copy(self) -> "InstanceLoad":
        """Copy the bookkeeping; chunks are immutable and shared."""
        return replace(self, in_flight=dict(self.in_flight), queued=list(self.queued))

    def _has_room(self, num_pages: int) -> bool:
        return not self.is_full and num_pages <= self.num_free_pages


def choose_instance(
    loads: Iterable[InstanceLoad], num_tokens: int, last_instance_id: int | None, prefetch_chunks: int
) -> InstanceLoad | None:
    """Choose the least loaded instance with room for a chunk's whole KV footprint (Algorithm 2, instance choice).

    An instance that can start the chunk at once goes before one where it would queue. Then the shorter queue, the
    instance that ran the request last (its KV may still be there), the smaller share of reserved pages, the fewer
    chunks, the smaller id.

    Args:
        loads: The live instances.
        num_tokens: Tokens of the request when the chunk ends, prompt included.
        last_instance_id: Where the request's previous chunk was; None if there was none.
        prefetch_chunks: Chunks that may queue at an instance.

    Returns:
        The instance, or None if the chunk can neither start nor queue anywhere now.
    """
    best, best_key, page_size, num_pages = None, None, 0, 0
    for load in loads:  # Runs for every instance at every decision, hence no calls for what most of them fail.
        info, num_queued = load.info, len(load.queued)
        if info.page_size != page_size:
            page_size, num_pages = info.page_size, pages_for_tokens(num_tokens, info.page_size)
        waits = num_queued > 0 or num_pages > info.num_total_pages - load.num_reserved_pages or load.is_full
        if waits and num_queued >= prefetch_chunks:
            continue
        if num_tokens > info.max_model_len or num_pages > info.num_total_pages:
            continue
        key = (
            waits,
            num_queued,
            info.instance_id != last_instance_id,
            load.num_reserved_pages / info.num_total_pages,
            len(load.in_flight),
            info.instance_id,
        )
        if best_key is None or key < best_key:
            best, best_key = load, key
    return best
