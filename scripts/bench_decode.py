"""Decode speed of the engine beside a plain `lax.while_loop` decode of the same model, and under heavy-tailed lengths.

    python scripts/bench_decode.py --json

Both run in this process in alternation, so that the ratio survives a noisy machine. The plain loop is what a careful
user would write by hand: dense cache, one jitted program for prefill and all steps, no pages, no per-request keys.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.config.schema import EngineConfig, RolloutConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import ChunkFinished, Event
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import RequestChunk, RequestId, RolloutGroup, SamplingParams
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.models import decoder, mla
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, decoder_specs, init_params

MODEL = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
)
NUM_SLOTS, PROMPT, NEW_TOKENS = 16, 32, 128
GROUPS, GROUP_SIZE, MAX_LENGTH, NUM_DRAWS = 8, 8, 512, 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="alternations of engine and plain loop")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    params = init_params(jax.random.key(0), decoder_specs(MODEL, jnp.float32))
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "num_parameters": _size(params)}
    result |= bench_full_batch(params, args.pairs)
    result |= bench_heavy_tail(params, args.pairs)
    print(json.dumps(result, indent=None if args.json else 2))


def bench_full_batch(params: Params, pairs: int) -> dict[str, float]:
    """16 prompts of 32 tokens, 128 new tokens each: engine and plain loop in alternation."""
    engine = make_engine(params)
    prompts = np.random.default_rng(0).integers(3, 500, (NUM_SLOTS, PROMPT)).astype(np.int32)
    plain = jax.jit(plain_decode)
    jax.block_until_ready(plain(params, prompts, jax.random.key(1)))
    run_engine(engine, prompts)
    speeds = {"engine": [], "plain": []}
    for _ in range(pairs):
        started = time.perf_counter()
        jax.block_until_ready(plain(params, prompts, jax.random.key(1)))
        speeds["plain"].append(NUM_SLOTS * NEW_TOKENS / (time.perf_counter() - started))
        started = time.perf_counter()
        run_engine(engine, prompts)
        speeds["engine"].append(NUM_SLOTS * NEW_TOKENS / (time.perf_counter() - started))
    status = engine.status()
    return {
        "engine_tokens_per_s": statistics.median(speeds["engine"]),
        "plain_tokens_per_s": statistics.median(speeds["plain"]),
        "ratio": statistics.median(e / p for e, p in zip(speeds["engine"], speeds["plain"], strict=True)),
        "host_share": status.host_time_s / (status.host_time_s + status.device_time_s),
        "steps_per_dispatch": status.num_steps / status.num_dispatches,
    }


def bench_heavy_tail(params: Params, repeats: int) -> dict[str, float]:
    """64 requests of grouped log-normal lengths on 16 slots, as a share of the full-batch rate of the same minute."""
    draws = [draw_lengths(seed) for seed in range(NUM_DRAWS)]
    total = sum(sum(lengths.values()) for lengths in draws)
    # Static batches of 16 in order of submission run as long as their longest member.
    batches = np.array([list(lengths.values()) for lengths in draws]).reshape(-1, NUM_SLOTS)
    result = {
        "heavy_tail_mean_length": float(batches.mean()),
        "heavy_tail_max_length": int(batches.max()),
        "static_batch_share": total / (batches.max(axis=1).sum() * NUM_SLOTS),
    }
    engine = make_engine(params)
    prompts = np.random.default_rng(0).integers(3, 500, (NUM_SLOTS, PROMPT)).astype(np.int32)
    speeds: dict[str, list[float]] = {"full": [], "seer": [], "group_round_robin": []}
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in draws:
            run_engine(engine, prompts)
        speeds["full"].append(len(draws) * NUM_SLOTS * NEW_TOKENS / (time.perf_counter() - started))
        for policy in ("seer", "group_round_robin"):
            speeds[policy].append(total / sum(run_policy(policy, engine, lengths) for lengths in draws))
    for policy in ("seer", "group_round_robin"):
        pairs = zip(speeds[policy][1:], speeds["full"][1:], strict=True)  # the first round compiles
        result[f"heavy_tail_{policy}_tokens_per_s"] = statistics.median(speeds[policy][1:])
        result[f"heavy_tail_{policy}_share"] = statistics.median(speed / full for speed, full in pairs)
    return result


def run_policy(policy: str, engine: Engine, lengths: Mapping[RequestId, int]) -> float:
    """Roll out requests of these lengths; returns seconds."""
    rng = np.random.default_rng(2)
    sampling = SamplingParams(max_tokens=MAX_LENGTH)
    groups = [
        RolloutGroup(
            group_id=g,
            prompt_token_ids=rng.integers(3, 500, PROMPT).astype(np.int32),
            group_size=GROUP_SIZE,
            sampling=sampling,
        )
        for g in range(GROUPS)
    ]
    cluster = ForcedLengths(LocalCluster([engine]), lengths)
    stats = RolloutRunner(cluster, RolloutDriver(make_policy(policy, RolloutConfig()))).run(groups).stats
    assert stats.generated_tokens == sum(lengths.values())
    return stats.rollout_time_s


def draw_lengths(seed: int) -> dict[RequestId, int]:
    """Log-normal between groups times log-normal within, cut at the limit: mean near 130, correlation near 0.7."""
    rng = np.random.default_rng(seed)
    between = rng.normal(np.log(95), 0.8, (GROUPS, 1))
    lengths = np.exp(between + rng.normal(0, 0.5, (GROUPS, GROUP_SIZE))).clip(8, MAX_LENGTH).astype(int)
    return {RequestId(g, i): int(lengths[g, i]) for g in range(GROUPS) for i in range(GROUP_SIZE)}


class ForcedLengths:
    """A cluster whose requests end at given lengths, which the driver does not know."""

    def __init__(self, cluster: LocalCluster, lengths: Mapping[RequestId, int]) -> None:
        self._cluster, self._lengths = cluster, lengths
        self.infos = cluster.infos
        self.start_iteration, self.close = cluster.start_iteration, cluster.close
        self.pool_stats = cluster.pool_stats

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """Cut each request at its length."""

        def cut(chunk: RequestChunk) -> RequestChunk:
            return dataclasses.replace(
                chunk, max_total_tokens=chunk.num_prompt_tokens + self._lengths[chunk.request_id]
            )

        self._cluster.send({i: [cut(chunk) for chunk in batch] for i, batch in chunks.items()})

    def wait(self) -> list[Event]:
        """Report the forced end as a stop token would be."""

        def stop(event: Event) -> Event:
            ended = isinstance(event, ChunkFinished) and event.finish_reason == "length"
            return dataclasses.replace(event, finish_reason="stop") if ended else event

        return [stop(event) for event in self._cluster.wait()]


def make_engine(params: Params) -> Engine:
    """An engine with room for all, warmed up."""
    config = EngineConfig(max_num_seqs=NUM_SLOTS, max_model_len=1024, num_pages=2048, compilation_cache_dir=None)
    return Engine(MODEL, params, config)


def run_engine(engine: Engine, prompts: np.ndarray) -> None:
    """Decode every prompt to the full length."""
    engine.start_iteration(0)
    for i, prompt in enumerate(prompts):
        engine.submit(
            RequestChunk(
                request_id=RequestId(0, i),
                chunk_index=0,
                token_ids=prompt,
                num_prompt_tokens=PROMPT,
                max_chunk_tokens=NEW_TOKENS,
                max_total_tokens=PROMPT + NEW_TOKENS,
                num_reserved_pages=-(-(PROMPT + NEW_TOKENS) // engine.info.page_size),
                policy_version=0,
                priority=0,
                sampling=SamplingParams(max_tokens=NEW_TOKENS),
                sampling_key=i,
            )
        )
    while engine.has_work:
        engine.step()


def plain_decode(params: Params, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """Prefill and decode with a dense cache in one program; returns [slots, new tokens]."""
    batch, length = prompts.shape
    total = length + NEW_TOKENS
    slots = jnp.arange(total)

    def run(caches: list, tokens: jax.Array, start: Any) -> tuple[jax.Array, list]:
        width = tokens.shape[1]
        positions = start + jnp.arange(width)
        caches = list(caches)

        def attend(layer: int, queries: mla.MLAQueries, latent: jax.Array, attn: Params) -> jax.Array:
            rows = latent.reshape(batch, width, -1)
            caches[layer] = cache = jax.lax.dynamic_update_slice(caches[layer], rows, (0, start, 0))
            q = mla.absorb_queries(attn, queries).reshape(batch, width, MODEL.num_attention_heads, -1)
            scores = jnp.einsum("bqhw,bkw->bqhk", q, cache) * MODEL.softmax_scale
            visible = slots <= positions[:, None, None]
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
            out = jnp.einsum("bqhk,bkc->bqhc", weights, cache[..., : MODEL.kv_lora_rank])
            return mla.unabsorb_values(attn, out.reshape(batch * width, *out.shape[2:]))

        hidden = decoder.forward(params, MODEL, tokens.reshape(-1), jnp.tile(positions, batch), attend)
        last = hidden.reshape(batch, width, -1)[:, -1]
        return decoder.project_logits(params, MODEL, last), caches

    def body(state: tuple) -> tuple:
        step, tokens, caches, output = state
        logits, caches = run(caches, tokens[:, None], length + step - 1)
        tokens = jax.random.categorical(jax.random.fold_in(key, step), logits)
        return step + 1, tokens, caches, output.at[:, step].set(tokens)

    caches = [jnp.zeros((batch, total, MODEL.latent_width)) for _ in range(MODEL.num_hidden_layers)]
    logits, caches = run(caches, prompts, 0)
    tokens = jax.random.categorical(key, logits)
    output = jnp.zeros((batch, NEW_TOKENS), jnp.int32).at[:, 0].set(tokens)
    return jax.lax.while_loop(lambda s: s[0] < NEW_TOKENS, body, (1, tokens, caches, output))[3]


def _size(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
