"""A drafter that lives on the device: many verified steps in one dispatch, no host in between.

    python scripts/bench_device_drafter.py --json

Siblings of one tiny_math prompt decode together, beside siblings that are done. Inside the `while_loop` every request
looks for the longest recent match of its last tokens in all texts of its group, by comparing, and drafts the `k` tokens
that followed; the engine's own forward and walk verify them. Beside it, in turn, the same loop without drafts.
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.config.presets import load_config, resolve_preset_path
from seer_jax.core.step_shapes import StepShape
from seer_jax.core.types import RequestId, sampling_key
from seer_jax.engine.sampler import sample
from seer_jax.engine.step import CPU_COMPILER_OPTIONS, _run_model
from seer_jax.engine.verify import Tokens, walk
from seer_jax.models import decoder
from seer_jax.models.config import DecoderConfig
from seer_jax.train.checks import stop_token_ids
from seer_jax.train.tasks import make_task
from seer_jax.weights.checkpoint import load_checkpoint

PAGE_SIZE, NUM_DONE = 16, 7
LONGEST_MATCH, SHORTEST_MATCH = 6, 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="rounds of all variants")
    parser.add_argument("--groups", type=int, default=6, help="prompts decoded one after the other in a round")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    config = load_config("tiny_math")
    model, params = load_checkpoint(resolve_preset_path(config.model.path), "float32")
    params = jax.device_put(params)
    stops = stop_token_ids(config, model)
    length = 320  # Enough for a prompt below 100 tokens and nearly every response to it.
    prompts = make_prompts(config, args.groups)
    rows = []
    for size in (1, 2, 4, 8):
        shape = {"model": model, "size": size, "length": length, "stop": stops[0]}
        loops = {k: build(k=k, **shape) for k in (0, 1, 2, 3)}
        rows.append(measure(loops, params, prompts, size, length, args.pairs))
        print(rows[-1], flush=True)
    if args.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}))


def make_prompts(config: Any, count: int) -> list[np.ndarray]:
    """Prompts whose whole text is short enough."""
    prompts = make_task(config.data).make_prompts(1, "train", 4 * count)
    return [prompt.token_ids for prompt in prompts if len(prompt.token_ids) < 100][:count]


@functools.cache
def build(*, model: DecoderConfig, size: int, length: int, stop: int, k: int) -> Any:
    """`loop(params, caches, texts, ends, keys, limit) -> (texts, ends, steps)`: decodes the first `size` texts."""
    width = 1 + k
    num_pages = length // PAGE_SIZE
    shape = StepShape(
        num_requests=size, num_rows=0, num_tiles=size, tile=width, num_pages=num_pages, max_depth=max(k, 1)
    )
    tables = 1 + jnp.arange(size * num_pages, dtype=jnp.int32).reshape(size, num_pages)
    row, column = jnp.arange(size), jnp.arange(width)
    stops = jnp.full((size, 1), stop, jnp.int32)

    def find(texts: jax.Array, ends: jax.Array) -> jax.Array:
        """Draft tokens [size, k]; -1 = none."""
        flat = texts.reshape(-1)
        run, matched = jnp.ones((size, len(flat)), bool), jnp.zeros((size, len(flat)), jnp.int32)
        for back in range(LONGEST_MATCH):
            token = texts[row, jnp.maximum(ends - 1 - back, 0)]
            run &= jnp.roll(flat, back)[None] == token[:, None]
            matched += run
        goes_on = jnp.roll(flat, -1) >= 0
        score = jnp.max(jnp.where(goes_on, matched * len(flat) + jnp.arange(len(flat)), 0), axis=1)
        place, is_found = score % len(flat), score // len(flat) >= SHORTEST_MATCH
        drafts = flat[jnp.minimum(place[:, None] + 1 + jnp.arange(k), len(flat) - 1)]
        is_text = jnp.cumprod(drafts >= 0, axis=1) > 0
        return jnp.where(is_found[:, None] & is_text, drafts, -1)

    def loop(params: Any, caches: list, texts: jax.Array, ends: jax.Array, keys: jax.Array, limit: jax.Array) -> Any:
        def advance(state: Any) -> Any:
            caches, texts, ends, is_active, steps = state
            newest = texts[row, ends - 1]
            drafts = find(texts, ends) if k else jnp.zeros((size, 0), jnp.int32)
            ids = jnp.concatenate([newest[:, None], drafts], axis=1)
            used = is_active[:, None] & (ids >= 0)
            flat = lambda values: jnp.broadcast_to(values, (size, width)).reshape(-1).astype(jnp.int32)  # noqa: E731
            tokens = Tokens(
                token_ids=jnp.maximum(ids, 0).reshape(-1),
                request=flat(row[:, None]),
                offset=flat(column),
                depth=flat(column),
                limit=flat(jnp.where(used, column + 1, 0)),
                mask=jnp.zeros(size * width, jnp.uint32),
                parent=flat(jnp.where(used & (column > 0), row[:, None] * width + column - 1, -1)),
                column=flat(jnp.where(used, column, -1)),
            )
            hidden, caches, _ = _run_model(params, caches, tokens, ends - 1, tables, config=model, shape=shape)
            owner = tokens.request
            ones = jnp.ones(size * width)
            drawn, logprobs = sample(
                decoder.project_logits(params, model, hidden), keys[owner], (ends - 1)[owner] + tokens.depth + 1,
                ones, ones.astype(jnp.int32) * 0, ones, truncates=False,
            )  # fmt: skip
            emitted = walk(drawn, logprobs, tokens, stops, limit - ends, shape.max_depth)
            place = jnp.where(jnp.arange(shape.max_depth + 1) < emitted.count[:, None], ends[:, None], 1 << 20)
            place += jnp.arange(shape.max_depth + 1)
            texts = texts.at[row[:, None], place].set(emitted.token_ids, mode="drop")
            ends += emitted.count
            last = texts[row, ends - 1]
            return caches, texts, ends, is_active & (last != stop) & (ends < limit), steps + 1

        state = (caches, texts, ends, jnp.ones(size, bool), jnp.int32(0))
        caches, texts, ends, _, steps = jax.lax.while_loop(lambda s: s[3].any(), advance, state)
        return caches, texts, ends, steps

    return jax.jit(loop, donate_argnums=1, compiler_options=CPU_COMPILER_OPTIONS)


def measure(loops: dict[int, Any], params: Any, prompts: list[np.ndarray], size: int, length: int, pairs: int) -> dict:
    """Medians over rounds: seconds per step and per token of every draft length, and ratios to none."""
    model_caches = make_caches(params, size, length)
    done = [decode(loops[0], params, model_caches, p, [], range(100, 100 + size), length)[0] for p in prompts]
    others = []
    for prompt, first in zip(prompts, done, strict=True):
        texts = list(first)
        while len(texts) < NUM_DONE:
            texts += decode(
                loops[0], params, model_caches, prompt, [], range(100 + len(texts), 100 + len(texts) + size), length
            )[0]
        others.append(texts[:NUM_DONE])
    seconds: dict[int, list[float]] = {k: [] for k in loops}
    counts: dict[int, tuple[int, int]] = {}
    answers: dict[int, list[list[int]]] = {}
    for _ in range(pairs + 1):
        for k, loop in loops.items():
            tokens = steps = 0
            answers[k], started = [], time.perf_counter()
            for prompt, texts in zip(prompts, others, strict=True):
                said, num_steps = decode(loop, params, model_caches, prompt, texts, range(size), length)
                steps += num_steps
                tokens += sum(len(text) - len(prompt) for text in said)
                answers[k] += [text.tolist() for text in said]
            seconds[k].append(time.perf_counter() - started)
            counts[k] = tokens, steps
    assert all(answers[k] == answers[0] for k in loops), "drafts changed what was said"
    row: dict[str, float] = {"requests": size}
    for k in loops:
        times = seconds[k][1:]
        row[f"k{k}_tokens_per_s"] = round(counts[k][0] / statistics.median(times), 1)
        if k:
            row[f"k{k}_ratio"] = round(statistics.median(a / b for a, b in zip(seconds[0][1:], times, strict=True)), 3)
            row[f"k{k}_steps_saved"] = round(counts[0][1] / counts[k][1], 3)
    return row


def make_caches(params: Any, size: int, length: int) -> dict[str, list]:
    """Caches behind a name, because every call donates them."""
    width = params["layers"][0]["attn"]["kv_a_proj"].shape[1]
    shape = (1 + size * length // PAGE_SIZE, PAGE_SIZE, width)
    return {"caches": [jnp.zeros(shape) for _ in params["layers"]]}


def decode(
    loop: Any,
    params: Any,
    holder: dict[str, list],
    prompt: np.ndarray,
    others: list[np.ndarray],
    seeds: range,
    length: int,
) -> tuple[list[np.ndarray], int]:
    """Decode siblings of a prompt; returns their texts, prompt included, and the steps that it took."""
    size = len(seeds)
    texts = np.full((size + NUM_DONE, length), -1, np.int32)
    texts[:size, : len(prompt)] = prompt
    for i, other in enumerate(others, start=size):
        texts[i, : len(other)] = other
    keys = [sampling_key(0, 0, RequestId(0, seed)) for seed in seeds]
    keys = np.array([[key & 0xFFFFFFFF, key >> 32] for key in keys], np.uint32)
    prefill(params, holder, prompt, size, length)
    ends = np.full(size, len(prompt), np.int32)
    limit = np.int32(length - 1)
    holder["caches"], texts, ends, steps = loop(params, holder["caches"], texts, ends, keys, limit)
    texts, ends = np.asarray(texts), np.asarray(ends)
    return [texts[i, : ends[i]] for i in range(size)], int(steps)


def prefill(params: Any, holder: dict[str, list], prompt: np.ndarray, size: int, length: int) -> None:
    """Compute the prompt's KV for every request, in a program that all variants share."""
    padded = np.zeros(128, np.int32)
    padded[: len(prompt)] = prompt
    holder["caches"] = _prefill(params, holder["caches"], padded, np.int32(len(prompt)), size, length)


@functools.partial(jax.jit, donate_argnums=1, static_argnums=(4, 5))
def _prefill(params: Any, caches: list, prompt: jax.Array, count: jax.Array, size: int, length: int) -> list:
    model = load_model()
    num_pages = length // PAGE_SIZE
    tables = 1 + jnp.arange(size * num_pages, dtype=jnp.int32).reshape(size, num_pages)
    shape = StepShape(num_requests=size, num_rows=0, num_tiles=size, tile=128, num_pages=num_pages)
    column = jnp.tile(jnp.arange(128), size)
    zeros = jnp.zeros_like(column)
    tokens = Tokens(
        token_ids=jnp.tile(prompt, size),
        request=jnp.repeat(jnp.arange(size), 128),
        offset=column,
        depth=column,
        limit=jnp.where(column < count, column + 1, 0),
        mask=zeros.astype(jnp.uint32),
        parent=zeros - 1,
        column=zeros - 1,
    )  # fmt: skip
    return _run_model(params, caches, tokens, jnp.zeros(size, jnp.int32), tables, config=model, shape=shape)[1]


@functools.cache
def load_model() -> DecoderConfig:
    """The shape of the tiny_math model."""
    return load_checkpoint(resolve_preset_path(load_config("tiny_math").model.path), "float32")[0]


if __name__ == "__main__":
    main()
