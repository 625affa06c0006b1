"""Seer's context-aware scheduling of divided rollout (the paper's Algorithm 2), and options beyond it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad, choose_instance
from seer_jax.core.request import RolloutRequest
from seer_jax.core.scheduling.base import PROBE_PRIORITY, REST_PRIORITY, Decision, start_reserved

TAIL_SHARE = 0.25
"""Share of an instance's requests that `tail_priority` takes as the critical path."""


@dataclass(frozen=True, kw_only=True)
class SeerPolicy:
    """Probes first, then the longest estimate; chunk by chunk, with the whole KV footprint reserved.

    The request is chosen before the instance, so one that fits nowhere now blocks those behind it until pages come
    back: the paper's behaviour, and what keeps long requests from being overtaken for ever by short ones.

    The last three attributes are not in the paper and off by default. They change order, place and size of chunks, so
    no token. Shrinking and backfilling look for what can start at once; a chunk that queues at an instance keeps others
    from starting there, so `prefetch_chunks` leaves them little to do.

    Attributes:
        chunk_size: Tokens generated per chunk.
        starvation_interval: Every so many decisions one goes to the most underserved group; 0 = never. A group with a
            waiting request is then served within `starvation_interval` x (number of groups) decisions.
        prefetch_chunks: Chunks that an instance accepts beyond its slots.
        min_chunk_size: A chunk that can start nowhere is halved, down to this, until it can; 0 = never.
        backfill_depth: When the chosen request can start nowhere, so many after it in order may go before it; 0 = it
            blocks them. Nobody passes a request that the safeguard chose, which bounds how long anyone is passed.
        tail_priority: Whether the critical path of the tail gets the high priority of probes, and so more drafts.
    """

    chunk_size: int
    starvation_interval: int
    prefetch_chunks: int
    min_chunk_size: int = 0
    backfill_depth: int = 0
    tail_priority: bool = False

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick a request, then the least loaded instance that has room for its next chunk."""
        if not buffer.waiting:
            return None
        is_forced = self.starvation_interval > 0 and (buffer.num_taken + 1) % self.starvation_interval == 0
        probe = None if is_forced else buffer.shortest_probe()
        request = probe or (buffer.most_underserved() if is_forced else buffer.longest())
        assert request is not None
        decision = self._fit(request, loads.values(), self._chunk_tokens(request), self.prefetch_chunks)
        if (self.min_chunk_size or self.backfill_depth) and not _starts(decision, loads):
            decision = self._start_other(buffer, request, loads, may_pass=not is_forced) or decision
        if decision is None:
            return None
        fired = decision.fired
        if not (is_forced or probe or "backfill" in fired):
            fired += buffer.context.fired(request)
        priority = decision.priority
        if self.tail_priority and priority != PROBE_PRIORITY and _is_critical(decision, buffer, loads):
            fired, priority = (*fired, "tail_priority"), PROBE_PRIORITY
        return replace(decision, fired=fired, priority=priority) if fired else decision

    def _start_other(
        self, buffer: RequestBuffer, request: RolloutRequest, loads: Mapping[int, InstanceLoad], *, may_pass: bool
    ) -> Decision | None:
        """Find what can start at once although the request's whole chunk cannot: less of it, or one behind it."""
        places = [load for load in loads.values() if load.can_start(1)]
        # What needs more than the emptiest has left is not even tried: this runs whenever the cluster is full.
        room = max((load.num_free_pages * load.info.page_size for load in places), default=0)
        max_chunk_tokens = self._chunk_tokens(request)
        while self.min_chunk_size and max_chunk_tokens > self.min_chunk_size:
            max_chunk_tokens = max(max_chunk_tokens // 2, self.min_chunk_size)
            if request.num_tokens + max_chunk_tokens > room:
                continue
            decision = self._fit(request, places, max_chunk_tokens, 0)
            if decision is not None:
                return replace(decision, fired=("adaptive_chunk",))
        if self.backfill_depth and may_pass and room:
            for other in buffer.probes_then_longest(self.backfill_depth + 1)[1:]:
                if other.num_tokens + self._chunk_tokens(other) > room:
                    continue
                decision = self._fit(other, places, self._chunk_tokens(other), 0)
                if decision is not None:
                    return replace(decision, fired=("backfill",))
        return None

    def _chunk_tokens(self, request: RolloutRequest) -> int:
        return min(self.chunk_size, request.remaining_tokens)

    def _fit(
        self, request: RolloutRequest, places: Iterable[InstanceLoad], max_chunk_tokens: int, prefetch_chunks: int
    ) -> Decision | None:
        num_tokens = request.num_tokens + max_chunk_tokens
        load = choose_instance(places, num_tokens, request.instance_id, prefetch_chunks)
        if load is None:
            return None
        return start_reserved(request, load, max_chunk_tokens, PROBE_PRIORITY if request.is_probe else REST_PRIORITY)


def _starts(decision: Decision | None, loads: Mapping[int, InstanceLoad]) -> bool:
    return decision is not None and loads[decision.instance_id].can_start(decision.num_reserved_pages)


def _is_critical(decision: Decision, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> bool:
    """Whether a chunk starts in the tail and is among the longest at its instance.

    The tail is when nothing else waits, in the buffer or at an instance: from then on nothing but the longest request
    decides when the iteration ends. Draft budgets weigh the requests of one instance against each other, so it is
    there that a request must be among the first in longest-first order.
    """
    if len(buffer.waiting) > 1 or any(load.queued for load in loads.values()):
        return False
    here = loads[decision.instance_id].in_flight
    num_places = max(1, int(TAIL_SHARE * (len(here) + 1)))
    key, num_longer = buffer.longest_key(decision.request), 0
    for request_id in here:
        num_longer += buffer.longest_key(buffer.running[request_id]) < key
        if num_longer >= num_places:
            return False
    return True
