"""What returning expert ids costs: two engines in one process, with and without, rolled out in turn.

`python scripts/bench_expert_ids.py [--rounds 9] [--requests 16] [--tokens 128]` prints tokens/s of both and the median
of the rounds' ratios as JSON. The model is the shipped tiny_math.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np

from seer_jax.config.presets import resolve_preset_path
from seer_jax.config.schema import EngineConfig
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams, sampling_key
from seer_jax.engine.engine import Engine
from seer_jax.weights import load_checkpoint

PROMPT = 64


def make_chunks(count: int, num_tokens: int, seed: int) -> list[RequestChunk]:
    """Requests with random prompts of their own that run to their limit."""
    rng, sampling = np.random.default_rng(seed), SamplingParams(max_tokens=num_tokens)
    return [
        RequestChunk(
            request_id=RequestId(i, 0),
            chunk_index=0,
            token_ids=rng.integers(0, 256, PROMPT).astype(np.int32),
            num_prompt_tokens=PROMPT,
            max_chunk_tokens=num_tokens,
            max_total_tokens=PROMPT + num_tokens,
            num_reserved_pages=-(-(PROMPT + num_tokens) // EngineConfig().page_size),
            policy_version=0,
            priority=0,
            sampling=sampling,
            sampling_key=sampling_key(seed, 0, RequestId(i, 0)),
        )
        for i in range(count)
    ]


def tokens_per_s(engine: Engine, chunks: list[RequestChunk]) -> float:
    """Run chunks to their end."""
    started, count = time.perf_counter(), 0
    for chunk in chunks:
        engine.submit(chunk)
    while engine.has_work:
        count += sum(len(event.token_ids) for event in engine.step())
    return count / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 9), ("requests", 16), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    model, params = load_checkpoint(resolve_preset_path("preset:model/tiny_math"), "float32")
    engines = [
        Engine(model, params, dataclasses.replace(EngineConfig(), expert_ids=flag, compilation_cache_dir=None))
        for flag in (False, True)
    ]
    for engine in engines:
        engine.warmup()
    rates = []
    for seed in range(arguments.rounds + 1):  # The first is not counted.
        order = (0, 1) if seed % 2 else (1, 0)
        measured = {i: tokens_per_s(engines[i], make_chunks(arguments.requests, arguments.tokens, seed)) for i in order}
        rates.append((measured[0], measured[1]))
    off, on = (statistics.median(rate[i] for rate in rates[1:]) for i in range(2))
    ratios = sorted(on / off for off, on in rates[1:])
    report = {"tokens_per_s_off": off, "tokens_per_s_on": on, "median_ratio": statistics.median(ratios)}
    report |= {"ratios": ratios, "expert_ids_shape": model.expert_ids_shape, "device": jax.devices()[0].device_kind}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
