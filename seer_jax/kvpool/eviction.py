"""Which block goes first: the lowest priority, then what was used longest ago, often-used blocks counting as newer."""

import heapq
import math
from collections import OrderedDict
from collections.abc import Mapping

Rank = tuple[float, float, int]
"""Priority, age, tie-break; the lowest goes first. The rank of a block never falls."""

REMEMBERED = 4
"""Uses are remembered of so many times the keys that are held, so that a block that comes back is known."""


class Ranks:
    """Value of every block that is held, in whatever tier.

    Plain LRU forgets that a prefix was shared by many as soon as enough blocks used once have passed by. Here a block
    used n times is as good as one used once log2(n) turnovers of the pool later. With equal counts this is LRU.
    """

    def __init__(self) -> None:
        self._ranks: dict[bytes, Rank] = {}
        self._uses: OrderedDict[bytes, int] = OrderedDict()
        self._clock = 0

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._ranks

    def __getitem__(self, digest: bytes) -> Rank:
        return self._ranks[digest]

    def use(self, digest: bytes, priority: float | None = None) -> None:
        """Note that a block was put or read; adds it if it is new. A priority of None stays as it is."""
        self._clock += 1
        old = self._ranks.get(digest)
        if priority is None:
            priority = old[0] if old else 0.0
        uses = self._uses.pop(digest, 0) + 1
        self._uses[digest] = uses
        rank = (priority, self._clock + len(self._ranks) * math.log2(uses), self._clock)
        self._ranks[digest] = rank if old is None else max(old, rank)
        while len(self._uses) > REMEMBERED * max(16, len(self._ranks)):
            self._uses.popitem(last=False)

    def forget(self, digest: bytes) -> None:
        """The block is gone; how often it was used stays known for a while."""
        self._ranks.pop(digest, None)


class VictimQueue:
    """Blocks that may be taken, least valuable first. Uses cost nothing here: ranks are compared when one is asked."""

    def __init__(self, ranks: Mapping[bytes, Rank] | Ranks) -> None:
        self._ranks = ranks
        self._members: set[bytes] = set()
        self._heap: list[tuple[Rank, bytes]] = []

    def __len__(self) -> int:
        return len(self._members)

    def add(self, digest: bytes) -> None:
        """Let a block be taken; it has a rank."""
        if digest in self._members:
            return
        self._members.add(digest)
        heapq.heappush(self._heap, (self._ranks[digest], digest))
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [(self._ranks[member], member) for member in self._members]
            heapq.heapify(self._heap)

    def discard(self, digest: bytes) -> None:
        """Do not let it be taken."""
        self._members.discard(digest)

    def peek(self) -> bytes | None:
        """The least valuable member, None if there is none."""
        while self._heap:
            rank, digest = self._heap[0]
            if digest not in self._members:
                heapq.heappop(self._heap)
            elif rank != self._ranks[digest]:
                heapq.heapreplace(self._heap, (self._ranks[digest], digest))
            else:
                return digest
        return None

    def pop(self) -> bytes | None:
        """Take the least valuable member out, None if there is none."""
        digest = self.peek()
        if digest is not None:
            self._members.remove(digest)
        return digest
