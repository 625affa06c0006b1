"""Where a chunk runs. The driver's own reservations are the telemetry: exact, immediate and the same on replay."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId


@dataclass(kw_only=True, eq=False, slots=True)
class InstanceLoad:
    """What the driver has sent to an instance and not got back.

    Attributes:
        info: What the instance can hold.
        in_flight: Its chunks, running or queued there.
        num_reserved_pages: Sum over `in_flight`.
    """

    info: InstanceInfo
    in_flight: dict[RequestId, RequestChunk] = field(default_factory=dict)
    num_reserved_pages: int = 0

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt plus response that the instance can finish when it is otherwise empty."""
        return min(self.info.max_model_len, self.info.num_total_pages * self.info.page_size)

    def add(self, chunk: RequestChunk) -> None:
        """Note a chunk that is sent."""
        self.in_flight[chunk.request_id] = chunk
        self.num_reserved_pages += chunk.num_reserved_pages
        assert self.num_reserved_pages <= self.info.num_total_pages, "reserved more pages than the instance has"

    def remove(self, request_id: RequestId) -> None:
        """Note that a chunk came back."""
        self.num_reserved_pages -= self.in_flight.pop(request_id).num_reserved_pages

    def copy(self) -> "InstanceLoad":
        """Copy the bookkeeping; chunks are immutable and shared."""
        return InstanceLoad(info=self.info, in_flight=dict(self.in_flight), num_reserved_pages=self.num_reserved_pages)


def choose_instance(
    loads: Iterable[InstanceLoad], num_tokens: int, last_instance_id: int | None, prefetch_chunks: int
) -> InstanceLoad | None:
    """Choose the least loaded instance with room for a chunk's whole KV footprint (Algorithm 2, instance choice).

    An instance that can start the chunk at once goes before one where it would queue. Then the smaller share of
    reserved pages, the fewer chunks, the instance that ran the request last, the smaller id.

    Args:
        loads: The live instances.
        num_tokens: Tokens of the request when the chunk ends, prompt included.
        last_instance_id: Where the request's previous chunk was; None if there was none.
        prefetch_chunks: Chunks that an instance accepts beyond its slots.

    Returns:
        The instance, or None if the chunk fits nowhere now.
    """
    best, best_key = None, None
    for load in loads:
        info, num_chunks = load.info, len(load.in_flight)
        if num_chunks >= info.max_num_seqs + prefetch_chunks or num_tokens > info.max_model_len:
            continue
        if load.num_reserved_pages + pages_for_tokens(num_tokens, info.page_size) > info.num_total_pages:
            continue
        key = (
            num_chunks >= info.max_num_seqs,
            load.num_reserved_pages / info.num_total_pages,
            num_chunks,
            info.instance_id != last_instance_id,
            info.instance_id,
        )
        if best_key is None or key < best_key:
            best, best_key = load, key
    return best
