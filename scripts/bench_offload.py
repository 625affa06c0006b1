"""What it costs the decode steps when paused KV leaves the device at the same time.

    python scripts/bench_offload.py --json

One engine of tiny_math decodes the same requests again and again; in every other round each dispatch also sends the KV
of one paused request to the pool, as if its pages were needed. Rounds alternate, so ratios survive a noisy machine.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace

import jax
import numpy as np

from seer_jax.config.presets import load_config, resolve_preset_path
from seer_jax.core.kv.rank_pages import ParkedKV
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams, sampling_key
from seer_jax.engine.engine import Engine
from seer_jax.engine.factory import build_engine
from seer_jax.weights.checkpoint import load_checkpoint


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="of each kind")
    parser.add_argument("--requests", type=int, default=16, help="that decode together")
    parser.add_argument("--tokens", type=int, default=256, help="of each request")
    parser.add_argument("--paused-tokens", type=int, default=256, help="whose KV leaves with every dispatch")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    config = load_config("tiny_math")
    pages_needed = (args.requests * (args.tokens + 32) + args.paused_tokens) // config.engine.page_size + 64
    config = replace(config, engine=replace(config.engine, num_pages=pages_needed, max_num_seqs=args.requests))
    model, params = load_checkpoint(resolve_preset_path(config.model.path), "float32")
    engine = build_engine(config, model, params, instance_id=0)
    rounds = [measure(engine, args, offloads=bool(i % 2)) for i in range(2 * args.rounds + 2)][2:]
    plain, offloading = rounds[::2], rounds[1::2]
    ratios = [b["step_ms"] / a["step_ms"] for a, b in zip(plain, offloading, strict=True)]
    result = {
        "device": f"cpu, {len(os.sched_getaffinity(0))} cores",
        "jax": jax.__version__,
        "requests": args.requests,
        "step_ms": statistics.median(r["step_ms"] for r in plain),
        "step_ms_offloading": statistics.median(r["step_ms"] for r in offloading),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4) if args.rounds > 1 else None,
        "offloaded_bytes_per_s": statistics.median(r["bytes"] / r["seconds"] for r in offloading),
    }
    print(json.dumps(result) if args.json else result)


def measure(engine: Engine, args: argparse.Namespace, *, offloads: bool) -> dict[str, float]:
    """Decode all requests to their end; time per step, everything between the steps included."""
    engine.start_iteration(0)
    sampling = SamplingParams(max_tokens=args.tokens)
    rng = np.random.default_rng(0)
    for i in range(args.requests):
        chunk = RequestChunk(
            request_id=RequestId(i, 0),
            chunk_index=0,
            token_ids=rng.integers(2, engine.model_config.vocab_size, 16).astype(np.int32),
            num_prompt_tokens=16,
            max_chunk_tokens=args.tokens,
            max_total_tokens=16 + args.tokens,
            num_reserved_pages=-(-(16 + args.tokens) // engine.info.page_size),
            policy_version=0,
            priority=0,
            sampling=sampling,
            sampling_key=sampling_key(0, 0, RequestId(i, 0)),
        )
        engine.submit(chunk)
    planner, num_bytes, num_dispatches = engine._planner, 0, 0
    num_pages = -(-args.paused_tokens // engine.info.page_size)
    page_bytes = engine._caches[0][0].nbytes * len(engine._caches)
    token_ids = np.arange(args.paused_tokens, dtype=np.int32)
    started = time.perf_counter()
    while engine.has_work:
        if offloads:
            # The last pages belong to nobody here; what is in them does not matter.
            pages = list(range(engine.config.num_pages - num_pages, engine.config.num_pages))
            planner.evicted.append((RequestId(1000 + num_dispatches, 0), ParkedKV(pages=pages, token_ids=token_ids)))
            num_bytes += num_pages * page_bytes
        engine.step()
        num_dispatches += 1
    seconds = time.perf_counter() - started
    return {"step_ms": 1e3 * seconds / engine.status().num_steps, "seconds": seconds, "bytes": num_bytes}


if __name__ == "__main__":
    main()
