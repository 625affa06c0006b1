"""The embedded KV pool's eviction on a trace, beside plain LRU and the offline optimum; run by `bench_kvpool.py`."""

import gzip
import heapq
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from seer_jax.kvpool.eviction import Ranks, VictimQueue

CAPACITIES = (1000, 3000, 10_000, 30_000, 100_000)


def replay(path: Path) -> list[dict[str, float]]:
    """Share of 512-token prompt blocks found, a prefix counting up to its first miss, by capacity in blocks."""
    with gzip.open(path, "rt") as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    total = sum(map(len, requests))
    rows = []
    for capacity in CAPACITIES:
        hits = {
            "pool": replay_pool(requests, capacity),
            "lru": replay_lru(requests, capacity),
            "belady": replay_belady(requests, capacity),
        }
        rows.append({"capacity_blocks": capacity} | {name: round(count / total, 4) for name, count in hits.items()})
        print(rows[-1], flush=True)
    return rows


def replay_pool(requests: list[list[int]], capacity: int) -> int:
    """The pool's own eviction: read the prefix that is there, put the rest."""
    ranks, num_hits = Ranks(), 0
    queue = VictimQueue(ranks)
    for request in requests:
        blocks = [block.to_bytes(8) for block in request]
        num_hits += count_prefix(blocks, ranks)
        for block in blocks:
            ranks.use(block)
            queue.add(block)
        while len(queue) > capacity:
            ranks.forget(queue.pop())
    return num_hits


def replay_lru(requests: list[list[int]], capacity: int) -> int:
    """Plain LRU."""
    held: OrderedDict[int, None] = OrderedDict()
    num_hits = 0
    for request in requests:
        num_hits += count_prefix(request, held)
        for block in request:
            held[block] = None
            held.move_to_end(block)
        while len(held) > capacity:
            held.popitem(last=False)
    return num_hits


def replay_belady(requests: list[list[int]], capacity: int) -> int:
    """The offline optimum: what is needed last, or never, goes first, of equals the deepest in its prefix."""
    next_use: dict[int, int] = {}
    uses: list[list[int]] = []
    for index in range(len(requests) - 1, -1, -1):
        uses.append([next_use.get(block, len(requests)) for block in requests[index]])
        next_use |= dict.fromkeys(requests[index], index)
    held: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    num_hits = 0
    for request, nexts in zip(requests, reversed(uses), strict=True):
        num_hits += count_prefix(request, held)
        for depth, (block, use) in enumerate(zip(request, nexts, strict=True)):
            held[block] = use
            heapq.heappush(heap, (-use, -depth, block))
        while len(held) > capacity:
            use, _, block = heapq.heappop(heap)
            if held.get(block) == -use:
                del held[block]
    return num_hits


def count_prefix(blocks: Sequence, held) -> int:
    """Blocks up to the first that is missing."""
    return next((index for index, block in enumerate(blocks) if block not in held), len(blocks))
