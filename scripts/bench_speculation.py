"""Tokens per second with and without drafts, by how many requests decode together.

    python scripts/bench_speculation.py --json

For every batch size of the engine's programs a group of so many siblings of a tiny_math prompt is decoded to its end,
by every mode in turn, several times over in this process, so that ratios survive a noisy machine. Pages are plentiful.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import jax
import numpy as np

from seer_jax.config.presets import load_config, resolve_preset_path
from seer_jax.config.schema import SpeculationConfig
from seer_jax.core.types import RequestChunk, RequestId, RolloutGroup, SamplingParams, sampling_key
from seer_jax.engine.engine import Engine
from seer_jax.engine.factory import build_engine
from seer_jax.train.checks import stop_token_ids
from seer_jax.train.loop import make_groups, make_sampling
from seer_jax.train.tasks import make_task
from seer_jax.weights.checkpoint import load_checkpoint

MODES = {
    "off": SpeculationConfig(),
    "fixed": SpeculationConfig(mode="grouped", budget="fixed"),
    "mba_paper": SpeculationConfig(mode="grouped", budget="mba_paper"),
    "mba": SpeculationConfig(mode="grouped", budget="mba"),
    "suffix": SpeculationConfig(mode="suffix"),
    "grouped": SpeculationConfig(mode="grouped"),
    "grouped_tree": SpeculationConfig(mode="grouped_tree"),
}
"""Without a budget named it is the default, `expected_gain`."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="rounds of all modes")
    parser.add_argument("--groups", type=int, default=4, help="prompts decoded one after the other in a round")
    parser.add_argument("--modes", default=",".join(MODES), help="which modes, `off` first")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    config = load_config("tiny_math")
    config = replace(config, engine=replace(config.engine, num_pages=16 * 34 + 1))
    model, params = load_checkpoint(resolve_preset_path(config.model.path), "float32")
    names = args.modes.split(",")
    engines = {
        name: build_engine(replace(config, speculation=MODES[name]), model, params, instance_id=0) for name in names
    }
    prompts = dict(enumerate(make_task(config.data).make_prompts(1, "train", args.groups)))
    groups = make_groups(prompts, 1, make_sampling(config, stop_token_ids(config, model)), iteration=0)
    rows = []
    for size in (1, 2, 4, 8, 16):
        rows.append(measure(engines, groups, size, args.pairs))
        print(rows[-1], flush=True)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if args.json:
        print(json.dumps(device | {"rows": rows}))


def measure(engines: dict[str, Engine], groups: list[RolloutGroup], size: int, pairs: int) -> dict[str, float]:
    """Median tokens per second of each mode, and the median of its ratios to `off` in the same round."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    lengths: dict[str, float] = {}
    for round_ in range(pairs + 1):
        for name, engine in engines.items():
            engine.start_iteration(engine.policy_version)
            started, tokens = time.perf_counter(), 0
            for group in groups:
                tokens += decode_group(engine, group, size)
            if round_:  # The first one warms up, and teaches what drafts are worth.
                speeds[name].append(tokens / (time.perf_counter() - started))
            status = engine.status()
            lengths[name] = 1 + status.num_accepted_tokens / max(1, status.num_verified)
    row: dict[str, float] = {"requests": size}
    for name, values in speeds.items():
        row[f"{name}_tokens_per_s"] = round(statistics.median(values), 1)
        if name != "off":
            ratios = [value / off for value, off in zip(values, speeds["off"], strict=True)]
            row |= {f"{name}_ratio": round(statistics.median(ratios), 3), f"{name}_length": round(lengths[name], 2)}
    return row


def decode_group(engine: Engine, group: RolloutGroup, size: int) -> int:
    """Decode `size` siblings to their end; returns the tokens generated."""
    prompt = group.prompt_token_ids
    for index in range(size):
        request_id = RequestId(group.group_id, index)
        engine.submit(make_chunk(request_id, prompt, group.sampling, engine))
    tokens = 0
    while engine.has_work:
        tokens += sum(len(event.token_ids) for event in engine.step())
    return tokens


def make_chunk(request_id: RequestId, prompt: np.ndarray, sampling: SamplingParams, engine: Engine) -> RequestChunk:
    """A whole request as one chunk."""
    total = len(prompt) + sampling.max_tokens
    return RequestChunk(
        request_id=request_id,
        chunk_index=0,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        max_chunk_tokens=sampling.max_tokens,
        max_total_tokens=total,
        num_reserved_pages=-(-total // engine.info.page_size),
        policy_version=engine.policy_version,
        priority=0 if request_id.index == 0 else 1,
        sampling=sampling,
        sampling_key=sampling_key(sampling.seed, 0, request_id),
    )


if __name__ == "__main__":
    main()
