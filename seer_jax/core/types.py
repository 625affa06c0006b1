"""Plain values that travel between driver, instances and learner.

Everything here is immutable, picklable and free of jax and ray, so that the simulator, the in-process runtime and the
Ray runtime exchange the very same objects.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

TokenIds = np.ndarray
"""int32 [num_tokens]. Arrays, not tuples: an iteration of Kimi-K2 holds 250 M tokens in the controller."""
Logprobs = np.ndarray
"""float32 [num_tokens]."""
ExpertIds = np.ndarray
"""int16 [num_tokens, MoE layers, experts per token], see `Sample`."""


class RequestId(NamedTuple):
    """Names one of the `group_size` responses to one prompt."""

    group_id: int
    index: int


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is sampled.

    Attributes:
        max_tokens: Limit of generated tokens; a stop token counts.
        temperature: Divides the logits; 0 is greedy.
        top_p: Nucleus mass kept, in (0, 1]; 1 keeps all.
        top_k: Number of likeliest tokens kept; 0 keeps all.
        stop_token_ids: At most `MAX_STOP_TOKENS` ids that end the response; the stop token is part of it.
        seed: Root of all randomness of the rollout.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


MAX_STOP_TOKENS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutGroup:
    """One prompt and the number of responses wanted for it (a GRPO group)."""

    group_id: int
    prompt_token_ids: TokenIds
    group_size: int
    sampling: SamplingParams
    iteration: int = 0


@dataclass(frozen=True, kw_only=True)
class KVHandle:
    """Says that the KV of the first `num_tokens` tokens of a request can be had, and from where.

    Attributes:
        num_tokens: Tokens covered, counted from position 0.
        policy_version: Weights that produced the KV; useless under any other.
        ref: What the runtime needs to fetch it: the id of the instance that keeps it, or the fetched arrays; opaque to
            `core`.
    """

    num_tokens: int
    policy_version: int
    ref: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestChunk:
    """The schedulable unit of divided rollout: at most `max_chunk_tokens` further tokens of one request.

    Attributes:
        request_id: The request.
        chunk_index: 0, 1, ... within the request.
        token_ids: Prompt and all tokens generated so far.
        num_prompt_tokens: How many of `token_ids` are the prompt.
        max_chunk_tokens: Tokens to generate at most before the request is handed back.
        max_total_tokens: Prompt plus the request's own generation limit.
        num_reserved_pages: Pages set aside at admission for the whole chunk; 0 = grow on demand, may be preempted.
        num_shared_pages: Leading pages of the prompt that chunks of one group which run on an instance at the same time
            have in common; they count once. None of them holds the prompt's last token. 0 = every request has its own.
        policy_version: Weights that must produce the tokens.
        priority: Smaller runs first among chunks that wait at the same instance.
        sampling: How to sample.
        sampling_key: 64 bits that key all randomness of this request, see `sampling_key`.
        kv: KV that exists already; None = prefill from the tokens.
    """

    request_id: RequestId
    chunk_index: int
    token_ids: TokenIds
    num_prompt_tokens: int
    max_chunk_tokens: int
    max_total_tokens: int
    num_reserved_pages: int
    policy_version: int
    priority: int
    sampling: SamplingParams
    sampling_key: int
    kv: KVHandle | None = None
    num_shared_pages: int = 0


@dataclass(frozen=True, kw_only=True)
class InstanceInfo:
    """What an instance can hold; fixed for its life."""

    instance_id: int
    num_total_pages: int
    page_size: int
    max_num_seqs: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True)
class InstanceStatus:
    """Telemetry of one instance; counters run from the start of the iteration.

    Attributes:
        num_prefilled_tokens: Tokens whose KV was computed in prefill slices.
        num_reprefilled_tokens: Those of them whose KV had existed before and was lost.
        num_shared_tokens: Prompt tokens whose KV a sibling on the instance had: in pages in common, or copied.
        num_imported_tokens: Tokens of resumed chunks whose KV came from the host or from another instance.
        num_drafted_tokens: Draft tokens verified.
        num_accepted_tokens: Tokens emitted by verification beyond the one that a plain step emits.
        num_verified: Drafts verified, one per sequence and step, empty ones included.
        num_free_pages: Pages that a chunk could get; those of paused requests' KV are among them.
        num_corrupt_blocks: KV blocks that came damaged out of the pool.
        num_lost_blocks: KV blocks that the pool had no room for, or gave up for others.
        num_spilled_bytes: KV that the pool wrote to disk.
        kv_wait_s: Time the engine waited for KV from the pool.
        num_saved_bytes: KV sent to the pool.
        num_declined_moves: Times that KV in the pool was computed again because that was measured to be faster.
        pool_peak_bytes: Most memory that the pool had in use since it was opened, if it is this instance's own.
    """

    instance_id: int
    num_running: int
    num_waiting: int
    num_free_pages: int
    num_total_pages: int
    step_time_s: float = 0.0
    num_generated_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_reprefilled_tokens: int = 0
    num_shared_tokens: int = 0
    num_imported_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_dispatches: int = 0
    host_time_s: float = 0.0
    device_time_s: float = 0.0
    draft_time_s: float = 0.0
    verify_time_s: float = 0.0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_verified: int = 0
    max_kv_utilization: float = 0.0
    num_corrupt_blocks: int = 0
    num_lost_blocks: int = 0
    num_spilled_bytes: int = 0
    kv_wait_s: float = 0.0
    num_saved_bytes: int = 0
    num_declined_moves: int = 0
    pool_peak_bytes: int = 0
    policy_version: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One finished response.

    Attributes:
        request_id: The request.
        prompt_token_ids: The prompt.
        token_ids: The response, stop token included.
        logprobs: Log-probability of each response token under the distribution it was drawn from.
        finish_reason: "stop" (stop token) or "length" (limit reached).
        policy_version: Weights that produced every token.
        num_chunks: Chunks that it took.
        expert_ids: The experts that the rollout chose, int16 [response tokens, MoE layers, experts per token]; None
            unless `engine.expert_ids`. Row i is of the very forward pass that response token i was drawn from, whose
            input is the token before it: row 0 belongs to the prompt's last token, and the last response token, which
            was never fed in, has no row. So rows lie as `logprobs` do and all are known, whatever was paused, moved,
            preempted or drafted. The prompt's other tokens have none: their KV may come from a sibling. Dense layers
            are left out; the experts of a token come in no promised order.
    """

    request_id: RequestId
    prompt_token_ids: TokenIds
    token_ids: TokenIds
    logprobs: Logprobs
    finish_reason: str
    policy_version: int
    num_chunks: int
    expert_ids: ExpertIds | None = None


def sampling_key(seed: int, iteration: int, request_id: RequestId) -> int:
    """Derive the 64-bit key of a request: the same for every chunking, placement and batch, distinct inside a group."""
    text = f"{seed}/{iteration}/{request_id.group_id}/{request_id.index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def output_sha256(samples: "list[Sample]") -> str:
    """Hash (group, index, token ids) of all samples in sorted order: equal hashes mean token-identical rollouts."""
    digest = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: s.request_id):
        header = (sample.request_id.group_id, sample.request_id.index, len(sample.token_ids))
        digest.update(np.asarray(header, "<i8").tobytes() + np.asarray(sample.token_ids, "<i4").tobytes())
    return digest.hexdigest()


TAIL_SHARE = 0.1
"""The last tenth of the requests to finish are the tail (Seer, section 2.2)."""


def tail_time_s(finish_times: Sequence[float], rollout_time_s: float) -> float:
    """Time in which only the tail runs: from the end of the 90th percentile request to the end of the rollout.

    Args:
        finish_times: Seconds at which the requests ended, in any order; at least one.
        rollout_time_s: End of the rollout, in the same seconds.
    """
    last_before = max(0, math.ceil(len(finish_times) * (1 - TAIL_SHARE)) - 1)
    return rollout_time_s - sorted(finish_times)[last_before]
