"""The global request buffer: which requests wait, in the orders that scheduling policies ask for, and which run.

Every pick costs O(log n), not a sort: an iteration has 10,000 requests and a decision is due at every chunk.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeAlias

from seer_jax.core.context import ContextManager
from seer_jax.core.request import RequestState, RolloutRequest
from seer_jax.core.types import RequestId

_Key: TypeAlias = tuple[int, ...]


class RequestHeap:
    """Min-heap of requests whose keys may change; a stale entry is dropped when it comes to the top.

    Keys end in the unique `arrival`, so no two requests tie.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[_Key, RolloutRequest]] = []
        self._keys: dict[RequestId, _Key] = {}

    def put(self, request: RolloutRequest, key: _Key) -> None:
        """Add a request, or change its key."""
        if self._keys.get(request.request_id) != key:
            self._keys[request.request_id] = key
            heapq.heappush(self._entries, (key, request))

    def discard(self, request: RolloutRequest) -> None:
        """Remove a request if it is there."""
        self._keys.pop(request.request_id, None)

    def peek(self) -> RolloutRequest | None:
        """Return the request with the smallest key and leave it in; None if empty."""
        while self._entries:
            key, request = self._entries[0]
            if self._keys.get(request.request_id) == key:
                return request
            heapq.heappop(self._entries)
        return None


class RequestBuffer:
    """The unfinished requests of one iteration.

    Attributes:
        waiting: Requests to be scheduled, in the order in which they came (back) to the buffer.
        running: Requests with a chunk at an instance.
        num_taken: Requests taken so far, that is scheduling decisions of this iteration.

    Invariants: a request is in `waiting` or in `running`, never both; each of the other structures holds exactly the
    waiting requests, `_probes` the probes among them.
    """

    def __init__(self, context: ContextManager) -> None:
        self.context = context
        self.waiting: OrderedDict[RequestId, RolloutRequest] = OrderedDict()
        self.running: dict[RequestId, RolloutRequest] = {}
        self.num_taken = 0
        self._probes = RequestHeap()
        self._longest = RequestHeap()
        self._arrivals = RequestHeap()
        # Groups with waiting requests; the one that has gone longest without service comes first.
        self._groups: OrderedDict[int, dict[RequestId, RolloutRequest]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def put(self, request: RolloutRequest) -> None:
        """Let a request wait: a new one, or one whose chunk ended or was lost."""
        request.state = RequestState.WAITING
        self.running.pop(request.request_id, None)
        changed = self.context.observe(request)
        self._insert(request)
        self._reorder(changed)

    def take(self, request: RolloutRequest) -> None:
        """Move a waiting request to the running ones; counts as service of its group."""
        request.state = RequestState.RUNNING
        self.running[request.request_id] = self.waiting.pop(request.request_id)
        self.num_taken += 1
        self._longest.discard(request)
        self._arrivals.discard(request)
        if request.is_probe:
            self._probes.discard(request)
        group_id = request.request_id.group_id
        del self._groups[group_id][request.request_id]
        if self._groups[group_id]:
            self._groups.move_to_end(group_id)
        else:
            del self._groups[group_id]

    def finish(self, request: RolloutRequest) -> None:
        """Let a running request leave for good; its length re-orders its waiting siblings."""
        request.state = RequestState.FINISHED
        del self.running[request.request_id]
        self._reorder(self.context.observe(request))

    def restore(
        self,
        waiting: Iterable[RolloutRequest],
        running: Iterable[RolloutRequest],
        service_order: Iterable[int],
        num_taken: int,
    ) -> None:
        """Fill an empty buffer with another's content; its `context` must have the other's, too.

        Args:
            waiting: The other's waiting requests in its order.
            running: Its running requests.
            service_order: Its `service_order()`.
            num_taken: Its `num_taken`.
        """
        for request in waiting:
            self._insert(request)
        for group_id in service_order:
            self._groups.move_to_end(group_id)
        self.running = {request.request_id: request for request in running}
        self.num_taken = num_taken

    def oldest(self) -> RolloutRequest | None:
        """Return the request that has waited longest."""
        return next(iter(self.waiting.values()), None)

    def shortest_probe(self) -> RolloutRequest | None:
        """Return the waiting probe with the fewest generated tokens (PICKSFS); the first to arrive of equals."""
        return self._probes.peek()

    def longest(self) -> RolloutRequest | None:
        """Return the waiting request, probe or not, with the longest estimate (PICKLFS).

        Of equals the one that has generated most: it is nearest to its end, which frees its KV and tells about the
        group, and fewer paused caches pile up in the pool. Then the first to arrive.
        """
        return self._longest.peek()

    def first_arrived(self) -> RolloutRequest | None:
        """Return the waiting request that stood first when the iteration was submitted."""
        return self._arrivals.peek()

    def most_underserved(self) -> RolloutRequest | None:
        """Return a request of the group that has had waiting requests and no service for longest.

        Within the group the probe comes first, then the request that has generated most.
        """
        for members in self._groups.values():
            return min(members.values(), key=lambda r: (not r.is_probe, -r.num_generated, r.arrival))
        return None

    def is_waiting(self, group_id: int) -> bool:
        """Whether some request of a group waits."""
        return group_id in self._groups

    def waiting_members(self, group_id: int) -> list[RolloutRequest]:
        """List the waiting requests of a group in order of submission."""
        return sorted(self._groups.get(group_id, {}).values(), key=lambda request: request.arrival)

    def service_order(self) -> tuple[int, ...]:
        """Return the ids of the groups with waiting requests, the longest without service first."""
        return tuple(self._groups)

    def _longest_key(self, request: RolloutRequest) -> tuple[int, int, int]:
        """Return what an unfinished request is ordered by in longest-first order; smaller comes first."""
        return -self.context.estimate(request), -request.num_generated, request.arrival

    def _insert(self, request: RolloutRequest) -> None:
        self.waiting[request.request_id] = request
        self._groups.setdefault(request.request_id.group_id, {})[request.request_id] = request
        if request.is_probe:
            self._probes.put(request, (request.num_generated, request.arrival))
        self._longest.put(request, self._longest_key(request))
        self._arrivals.put(request, (request.arrival,))

    def _reorder(self, group_ids: Iterable[int]) -> None:
        for group_id in group_ids:
            for request in self._groups.get(group_id, {}).values():
                self._longest.put(request, self._longest_key(request))
