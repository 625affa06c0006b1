"""The embedded KV pool beside raw copies and raw files, migration beside re-prefill, and its evictions on a trace.

    python scripts/bench_kvpool.py --json

Pool and raw operation of the same size alternate in this process, so that ratios survive a noisy machine. Nothing is
synced to the device: "disk" is the file system with its page cache, "cold" is after the cache of the files was dropped.
"""

import argparse
import gzip
import heapq
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from seer_jax.kvpool import BlockKey, EmbeddedKVPool, KVPool, Status, block_key, fingerprint
from seer_jax.kvpool.eviction import Ranks, VictimQueue

BLOCK_BYTES = (64 << 10, 1 << 20, 16 << 20)
TOTAL_BYTES = 128 << 20
BYTES_PER_TOKEN = {"moonlight": 31_104, "kimi_k2": 70_272}
MOVED_TOKENS = (1024, 4096, 16_384, 32_768)
CAPACITIES = (1000, 3000, 10_000, 30_000, 100_000)
TRACE = Path("../shared/data/mooncake_conversation_trace.jsonl.gz")

Timed = Callable[[int], object]


class Timing(NamedTuple):
    """Seconds of each call, and of what had to be waited for after the last; both count for the rate."""

    calls: list[float]
    after: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="alternations of pool and raw operation")
    parser.add_argument("--directory", type=Path, default=None, help="where files go; a temporary one by default")
    parser.add_argument("--trace", type=Path, default=TRACE, help="requests with `hash_ids` for the replay")
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, default=10_000, help="assumed rate of re-prefill for the migration table"
    )
    parser.add_argument("--ray", action="store_true", help="an owner in another process too, a block per call")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="kvpool-", dir=args.directory))
    try:
        tiers = {"dram": [], "disk": []}
        for size in BLOCK_BYTES:
            tiers["dram"].append(bench_memory(size, args.rounds, EmbeddedKVPool(TOTAL_BYTES)))
            tiers["disk"].append(bench_disk(size, args.rounds, directory))
            print(tiers["dram"][-1], tiers["disk"][-1], sep="\n", flush=True)
        if args.ray:
            tiers["ray"] = [bench_ray(size, args.rounds) for size in BLOCK_BYTES]
            print(*tiers["ray"], sep="\n", flush=True)
    finally:
        shutil.rmtree(directory)
    result = {
        "device": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "file_system": file_system(directory.parent),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "xxhash": xxhash.VERSION,
        "total_bytes": TOTAL_BYTES,
        "tiers": tiers,
        "migration": migration(tiers, args.prefill_tokens_per_s),
        "replay": replay(args.trace) if args.trace.exists() else f"no trace at {args.trace}",
    }
    print(json.dumps(result, indent=None if args.json else 2))


def bench_ray(size: int, rounds: int) -> dict[str, float]:
    """`bench_memory` of a pool whose owner is an actor on this machine."""
    import ray

    from seer_jax.distributed.kv_pool import MAX_CONCURRENCY, PoolOwner, RayKVPool
    from seer_jax.distributed.ray_cluster import start_ray

    start_ray()
    owner = ray.remote(PoolOwner).options(num_cpus=0, max_concurrency=MAX_CONCURRENCY)
    pool = RayKVPool("here")
    pool.connect({"here": owner.remote(partial(EmbeddedKVPool, TOTAL_BYTES))}, None)
    row = bench_memory(size, rounds, pool)
    ray.shutdown()
    return row


def bench_memory(size: int, rounds: int, pool: KVPool) -> dict[str, float]:
    """Put and get without a disk, beside memcpy between buffers of the same sizes."""
    keys, sources = make_blocks(size)
    target = np.zeros((len(keys), size), np.uint8)
    out = np.zeros(size, np.uint8)

    def start_round() -> None:
        pool.drop(keys)

    row = alternate(
        {
            "put": lambda index: expect(pool.put_blocks([keys[index]], [sources[index % len(sources)]])),
            "memcpy_in": lambda index: np.copyto(target[index], sources[index % len(sources)]),
            "get": lambda index: expect(pool.get_blocks([keys[index]], [out])),
            "memcpy_out": lambda index: np.copyto(out, target[index]),
        },
        len(keys),
        size,
        rounds,
        start_round,
    )
    pool.close()
    return with_ratios(row, {"put": "memcpy_in", "get": "memcpy_out"})


def bench_disk(size: int, rounds: int, directory: Path) -> dict[str, float]:
    """Put through a small DRAM tier and read back from files, beside write and read of one file."""
    keys, sources = make_blocks(size)
    dram_blocks = max(2, TOTAL_BYTES // 8 // size)
    out = np.zeros(size, np.uint8)
    files = directory / f"pool-{size}"
    pool = EmbeddedKVPool(
        dram_blocks * size, directory=files, max_disk_bytes=4 * TOTAL_BYTES, segment_bytes=TOTAL_BYTES // 4
    )
    path = directory / "raw"
    raw = os.open(path, os.O_RDWR | os.O_CREAT)
    num_read = len(keys) - dram_blocks  # The last ones are still in DRAM.
    rows: list[dict[str, Timing]] = []

    def start_round() -> None:
        pool.drop(keys)
        os.ftruncate(raw, 0)
        while pool.stats().disk_bytes:  # Files are deleted in the background.
            time.sleep(0.001)

    def put(index: int) -> None:
        expect(pool.put_blocks([keys[index]], [sources[index % len(sources)]]))

    def read(index: int) -> None:
        expect(pool.get_blocks([keys[index]], [out]))

    def write_raw(index: int) -> None:
        write_all(raw, sources[index % len(sources)], index * size)

    def go_cold() -> None:
        for name in (path, *files.glob("*.kvseg")):
            fd = os.open(name, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    for _ in range(rounds + 1):
        start_round()
        row = time_each("put", put, len(keys), finish=pool.flush)
        row |= time_each("file_write", write_raw, len(keys))
        for suffix in ("", "_cold"):
            if suffix:
                go_cold()
            row |= time_each("get" + suffix, read, num_read)
            row |= time_each("file_read" + suffix, lambda index: os.preadv(raw, [out], index * size), num_read)
        rows.append(row)
    pool.close()
    os.close(raw)
    path.unlink()
    shutil.rmtree(files)
    pairs = {"put": "file_write", "get": "file_read", "get_cold": "file_read_cold"}
    return with_ratios(summarise(rows, size), pairs)


def make_blocks(size: int) -> tuple[list[BlockKey], list[np.ndarray]]:
    """Keys for `TOTAL_BYTES`, and a few different blocks to fill them with."""
    layout = fingerprint(bench=size)
    keys = [block_key(None, np.array([index]), epoch=0, layout=layout) for index in range(TOTAL_BYTES // size)]
    rng = np.random.default_rng(0)
    return keys, [rng.integers(0, 256, size, np.uint8) for _ in range(4)]


def expect(statuses: Sequence[Status]) -> None:
    """Stop the benchmark if a block was not stored or found."""
    if not {Status.HIT, Status.STORED}.issuperset(statuses):
        raise RuntimeError(f"the pool answered {statuses}")


def write_all(fd: int, data: np.ndarray, offset: int) -> None:
    """Write a whole block at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def alternate(
    operations: dict[str, Timed], count: int, size: int, rounds: int, start_round: Callable[[], None]
) -> dict[str, float]:
    """Run all operations on all blocks, round after round; the first round warms up."""
    rows: list[dict[str, Timing]] = []
    for _ in range(rounds + 1):
        start_round()
        rows.append({})
        for name, operation in operations.items():
            rows[-1] |= time_each(name, operation, count)
    return summarise(rows, size)


def time_each(name: str, operation: Timed, count: int, finish: Callable[[], object] | None = None) -> dict[str, Timing]:
    """Seconds of each call, and of `finish`."""
    seconds = []
    for index in range(count):
        started = time.perf_counter()
        operation(index)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    if finish is not None:
        finish()
    return {name: Timing(seconds, time.perf_counter() - started)}


def summarise(rows: list[dict[str, Timing]], size: int) -> dict[str, float]:
    """Rates of every round but the first, and p99 over all of them."""
    result: dict[str, float] = {"block_bytes": size}
    for name in rows[0]:
        kept = [row[name] for row in rows[1:]]
        result[f"{name}_gb_per_s"] = [size * len(each.calls) / (sum(each.calls) + each.after) / 1e9 for each in kept]
        result[f"{name}_p99_ms"] = round(
            float(np.percentile(np.concatenate([each.calls for each in kept]), 99)) * 1e3, 3
        )
    return result


def with_ratios(row: dict[str, float], pairs: dict[str, str]) -> dict[str, float]:
    """Add the median ratio of each rate to its raw counterpart's of the same round; rates become medians."""
    for name, raw in pairs.items():
        ratios = [a / b for a, b in zip(row[f"{name}_gb_per_s"], row[f"{raw}_gb_per_s"], strict=True)]
        row[f"{name}_over_{raw}"] = statistics.median(ratios)
    return {
        key: value
        if isinstance(value, int)
        else round(statistics.median(value if isinstance(value, list) else [value]), 3)
        for key, value in row.items()
    }


def migration(tiers: dict[str, list[dict[str, float]]], prefill_tokens_per_s: float) -> dict:
    """Computed from the rates of the largest block: one put and one get against prefill. No network is in it."""
    rows = []
    for model, bytes_per_token in BYTES_PER_TOKEN.items():
        for tokens in MOVED_TOKENS:
            size = bytes_per_token * tokens
            row = {"model": model, "tokens": tokens, "bytes": size}
            for tier, measured in tiers.items():
                row[f"{tier}_s"] = round(
                    sum(size / measured[-1][f"{name}_gb_per_s"] / 1e9 for name in ("put", "get")), 4
                )
            rows.append(row | {"re_prefill_s": round(tokens / prefill_tokens_per_s, 4)})
    break_even = {
        f"{model}_{tier}": round(tokens / seconds)
        for model in BYTES_PER_TOKEN
        for tier in tiers
        for tokens, seconds in [next((row["tokens"], row[f"{tier}_s"]) for row in rows[::-1] if row["model"] == model)]
    }
    return {
        "note": "computed, not run: measured pool rates, assumed prefill rate",
        "assumed_prefill_tokens_per_s": prefill_tokens_per_s,
        "break_even_prefill_tokens_per_s": break_even,
        "rows": rows,
    }


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


def file_system(path: Path) -> str:
    """Type of the file system that the disk tier was measured on."""
    return subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
