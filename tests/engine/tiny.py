"""A small random model, and requests for it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.config.schema import EngineConfig
from seer_jax.core.events import ChunkFinished
from seer_jax.core.types import RequestChunk, RequestId, RolloutGroup, SamplingParams, sampling_key
from seer_jax.engine.engine import Engine
from seer_jax.engine.sampler import sample
from seer_jax.models import decoder
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, decoder_specs, init_params

MODEL = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    eos_token_id=(1,),
)
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=96,
    page_size=4,
    num_pages=128,
    max_prefill_tokens=16,
    prefill_tile=8,
    max_steps_per_dispatch=8,
    compilation_cache_dir=None,
)


@functools.cache
def params(seed: int = 0) -> Params:
    """Weights with sharp enough logits that sampling is far from uniform."""
    weights = init_params(jax.random.key(seed), decoder_specs(MODEL, jnp.float32))
    return jax.device_get(weights | {"lm_head": 4 * weights["lm_head"]})


def prompt(seed: int, length: int) -> np.ndarray:
    """A random prompt."""
    return np.random.default_rng(seed).integers(2, MODEL.vocab_size, length).astype(np.int32)


def groups(count: int, size: int, sampling: SamplingParams, iteration: int = 0) -> list[RolloutGroup]:
    """Groups whose prompts differ in length."""
    return [
        RolloutGroup(
            group_id=g, prompt_token_ids=prompt(g, 3 + 5 * g), group_size=size, sampling=sampling, iteration=iteration
        )
        for g in range(count)
    ]


def chunk(
    token_ids: np.ndarray,
    *,
    num_prompt: int | None = None,
    index: int = 0,
    chunk_index: int = 0,
    max_chunk: int = 20,
    max_tokens: int = 20,
    reserve: bool = True,
    sampling: SamplingParams | None = None,
    **fields: object,
) -> RequestChunk:
    """A chunk of request (0, index)."""
    sampling = sampling or SamplingParams(max_tokens=max_tokens)
    num_prompt = len(token_ids) if num_prompt is None else num_prompt
    request_id = RequestId(0, index)
    defaults = {
        "request_id": request_id,
        "chunk_index": chunk_index,
        "token_ids": token_ids,
        "num_prompt_tokens": num_prompt,
        "max_chunk_tokens": max_chunk,
        "max_total_tokens": num_prompt + max_tokens,
        "num_reserved_pages": -(-(len(token_ids) + max_chunk) // CONFIG.page_size) if reserve else 0,
        "num_shared_pages": (num_prompt - 1) // CONFIG.page_size,
        "policy_version": 0,
        "priority": 0,
        "sampling": sampling,
        "sampling_key": sampling_key(sampling.seed, 0, request_id),
    }
    return RequestChunk(**defaults | fields)


def drain(engine: Engine) -> dict[int, ChunkFinished]:
    """Run until idle; results by request index."""
    results = {}
    while engine.has_work:
        for event in engine.step():
            results[event.request_id.index] = event
    return results


@jax.jit
def _next_token(
    weights: Params,
    tokens: jax.Array,
    position: jax.Array,
    key: jax.Array,
    *law: Any,
) -> tuple[jax.Array, jax.Array]:
    hidden = decoder.forward_train(weights, MODEL, tokens[None])[0, position - 1]
    logits = decoder.project_logits(weights, MODEL, hidden)
    rows = (jnp.asarray(value)[None] for value in (logits, key, position, *law))
    token, logprob = sample(*rows, truncates=True)
    return token[0], logprob[0]


def reference_decode(request: RequestChunk, seed: int = 0) -> tuple[list[int], list[float]]:
    """Decode one request alone: the whole sequence through the training forward for every token, no cache."""
    tokens = np.zeros(CONFIG.max_model_len, np.int32)
    start = len(request.token_ids)
    tokens[:start] = request.token_ids
    key = np.array([request.sampling_key & 0xFFFFFFFF, request.sampling_key >> 32], np.uint32)
    sampling, logprobs = request.sampling, []
    law = (np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p))
    for position in range(start, min(start + request.max_chunk_tokens, request.max_total_tokens)):
        tokens[position], logprob = _next_token(params(seed), tokens.copy(), np.int32(position), key, *law)
        logprobs.append(float(logprob))
        if tokens[position] in sampling.stop_token_ids:
            break
    return tokens[start : start + len(logprobs)].tolist(), logprobs


def check_against_reference(chunks: Sequence[RequestChunk], results: Mapping[int, ChunkFinished]) -> None:
    """Every result has the tokens of cacheless decoding, and its log-probabilities up to rounding."""
    for chunk in chunks:
        tokens, logprobs = reference_decode(chunk)
        result = results[chunk.request_id.index]
        assert result.token_ids.tolist() == tokens
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
