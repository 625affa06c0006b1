"""KV pools beside raw copies and raw files, migration beside re-prefill, and the embedded one's evictions on a trace.

    python scripts/bench_kvpool.py --json
    python scripts/bench_kvpool.py --json --mooncake 127.0.0.1:50051  # That of scripts/start_mooncake.py

Pool and raw operation of the same size alternate in this process, so that ratios survive a noisy machine. Nothing is
synced to the device: "disk" is the file system with its page cache, "cold" is after the cache of the files was dropped.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from kvpool_replay import replay

from seer_jax.kvpool import BlockKey, EmbeddedKVPool, KVPool, MooncakeKVPool, Status, block_key, fingerprint

BLOCK_BYTES = (64 << 10, 1 << 20, 16 << 20)
TOTAL_BYTES = 128 << 20
BYTES_PER_TOKEN = {"moonlight": 31_104, "kimi_k2": 70_272}
MOVED_TOKENS = (1024, 4096, 16_384, 32_768)
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
    parser.add_argument(
        "--mooncake", metavar="HOST:PORT", help="measure Mooncake with this master, not the embedded pool"
    )
    parser.add_argument("--segment-mib", type=int, default=0, help="memory that this process lends to Mooncake")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    tiers = bench_mooncake(args) if args.mooncake else bench_embedded(args)
    if args.ray:
        tiers["ray"] = [bench_ray(size, args.rounds) for size in BLOCK_BYTES]
        print(*tiers["ray"], sep="\n", flush=True)
    result = {
        "device": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "xxhash": xxhash.VERSION,
        "total_bytes": TOTAL_BYTES,
        "tiers": tiers,
        "migration": migration(tiers, args.prefill_tokens_per_s),
    }
    if args.mooncake:
        result |= {"mooncake": version("mooncake-transfer-engine-non-cuda"), "segment_mib": args.segment_mib}
    else:
        result["file_system"] = file_system(args.directory or Path(tempfile.gettempdir()))
        result["replay"] = replay(args.trace) if args.trace.exists() else f"no trace at {args.trace}"
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
    row = bench_memory(pool, size, rounds)
    pool.close()
    ray.shutdown()
    return row


def bench_embedded(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both tiers, by block size."""
    directory = Path(tempfile.mkdtemp(prefix="kvpool-", dir=args.directory))
    tiers: dict[str, list[dict[str, float]]] = {"dram": [], "disk": []}
    try:
        for size in BLOCK_BYTES:
            pool = EmbeddedKVPool(TOTAL_BYTES)
            tiers["dram"].append(bench_memory(pool, size, args.rounds))
            pool.close()
            tiers["disk"].append(bench_disk(size, args.rounds, directory))
            print(tiers["dram"][-1], tiers["disk"][-1], sep="\n", flush=True)
    finally:
        shutil.rmtree(directory)
    return tiers


def bench_mooncake(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The pool, and beside it Mooncake's own calls on registered buffers without header, checksum or deadline."""
    pool = MooncakeKVPool(
        args.mooncake, namespace=f"bench-{os.getpid()}", segment_bytes=args.segment_mib << 20, timeout_s=10.0
    )
    rows = []
    for size in BLOCK_BYTES:
        # The pool's own client: another one in this process would reach what it lends over TCP.
        rows.append(bench_memory(pool, size, args.rounds, pool._store))
        print(rows[-1], flush=True)
    pool.close()
    return {"mooncake": rows}


def bench_memory(pool: KVPool, size: int, rounds: int, store: Any = None) -> dict[str, float]:
    """Put and get beside memcpy between buffers of the same sizes, and beside a Mooncake client if there is one."""
    keys, sources = make_blocks(size)
    target = np.zeros((len(keys), size), np.uint8)
    out = np.zeros(size, np.uint8)
    names = [f"raw-{os.getpid()}-{key.digest.hex()}" for key in keys]
    operations: dict[str, Timed] = {
        "put": lambda index: expect(pool.put_blocks([keys[index]], [sources[index % len(sources)]])),
        "memcpy_in": lambda index: np.copyto(target[index], sources[index % len(sources)]),
        "get": lambda index: expect(pool.get_blocks([keys[index]], [out])),
        "memcpy_out": lambda index: np.copyto(out, target[index]),
    }
    pairs = [("put", "memcpy_in"), ("get", "memcpy_out")]
    if store is not None:
        pairs += [("put", "store_put"), ("get", "store_get")]
        for buffer in (*sources, out):
            store.register_buffer(buffer.ctypes.data, size)
        operations |= {
            "store_put": lambda index: expect_code(
                store.put_from(names[index], sources[index % len(sources)].ctypes.data, size), 0
            ),
            "store_get": lambda index: expect_code(store.get_into(names[index], out.ctypes.data, size), size),
        }

    def start_round() -> None:
        pool.drop(keys)
        if store is not None:
            store.batch_remove(names, True)

    row = alternate(operations, len(keys), size, rounds, start_round)
    start_round()
    if store is not None:
        for buffer in (*sources, out):
            store.unregister_buffer(buffer.ctypes.data)
    return with_ratios(row, pairs)


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
    pairs = [("put", "file_write"), ("get", "file_read"), ("get_cold", "file_read_cold")]
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


def expect_code(code: int, wanted: int) -> None:
    """Stop the benchmark if Mooncake itself refuses."""
    if code != wanted:
        raise RuntimeError(f"Mooncake answered {code}")


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


def with_ratios(row: dict[str, float], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Add the median ratio of each rate to its raw counterpart's of the same round; rates become medians."""
    for name, raw in pairs:
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


def file_system(path: Path) -> str:
    """Type of the file system that the disk tier was measured on."""
    return subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
