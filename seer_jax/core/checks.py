"""Checks of what comes in from outside the driver, before it changes any state."""

from collections.abc import Sequence

from seer_jax.core.errors import CapacityError, ConfigError, InstanceLostError, ProtocolError
from seer_jax.core.events import ChunkFinished
from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.request import RolloutRequest
from seer_jax.core.types import MAX_STOP_TOKENS, RequestChunk, RolloutGroup


def check_groups(groups: Sequence[RolloutGroup], loads: Sequence[InstanceLoad]) -> None:
    """Check that every submitted request can be run to its limit by some instance.

    Args:
        groups: The groups of an iteration.
        loads: Live instances.

    Raises:
        ConfigError: There are no groups, or one of them is empty, longer than every instance's `max_model_len` or
            has too many stop tokens.
        CapacityError: A request can never fit in the pages of any instance.
        InstanceLostError: There is no instance.
        ProtocolError: Two groups have the same id.
    """
    if not loads:
        raise InstanceLostError("no instance has joined, or all are lost")
    if not groups:
        raise ConfigError("data", "no prompts", "an iteration needs at least one prompt group")
    seen: set[int] = set()
    for group in groups:
        if group.group_id in seen:
            raise ProtocolError(f"group {group.group_id} is submitted twice")
        seen.add(group.group_id)
        _check_group(group, loads)


def _check_group(group: RolloutGroup, loads: Sequence[InstanceLoad]) -> None:
    num_prompt_tokens, max_tokens = len(group.prompt_token_ids), group.sampling.max_tokens
    if num_prompt_tokens == 0:
        raise ConfigError("data", f"the prompt of group {group.group_id} is empty", "at least one token is needed")
    if group.group_size < 1:
        raise ConfigError("rollout.group_size", f"is {group.group_size}", "at least 1")
    if max_tokens < 1:
        raise ConfigError("sampling.max_tokens", f"is {max_tokens}", "at least 1")
    if (num_stops := len(group.sampling.stop_token_ids)) > MAX_STOP_TOKENS:
        raise ConfigError("sampling.stop_token_ids", f"are {num_stops} tokens", f"at most {MAX_STOP_TOKENS}")
    total = num_prompt_tokens + max_tokens
    needs = f"group {group.group_id}: prompt {num_prompt_tokens} + sampling.max_tokens {max_tokens} = {total} tokens"
    max_model_len = max(load.info.max_model_len for load in loads)
    if total > max_model_len:
        hint = f"raise it to {total}, or lower sampling.max_tokens to {max_model_len - num_prompt_tokens}"
        if num_prompt_tokens >= max_model_len:
            hint = f"raise it to {total}, or drop the prompt"
        raise ConfigError("engine.max_model_len", f"is {max_model_len}, but {needs}", hint)
    if total > max(load.max_request_tokens for load in loads):
        largest = max((load.info for load in loads), key=lambda info: info.num_total_pages * info.page_size)
        needed = pages_for_tokens(total, largest.page_size)
        hint = f"raise engine.num_pages to {needed + 1}, or lower sampling.max_tokens"
        raise CapacityError(needs, needed, largest.num_total_pages, "KV pages", hint)


def check_chunk_result(event: ChunkFinished, chunk: RequestChunk, request: RolloutRequest) -> None:
    """Check that a result is one that the chunk in flight can have.

    Args:
        event: What an instance returned.
        chunk: The chunk of that request in flight there.
        request: The request with its earlier chunks.

    Raises:
        ProtocolError: Another chunk or policy version, a number of tokens or a finish reason that cannot be; expert ids
            of another number of tokens or layers, or in some chunks only.
    """
    name = f"chunk {event.chunk_index} of {event.request_id} from instance {event.instance_id}"
    if event.chunk_index != chunk.chunk_index:
        raise ProtocolError(f"{name} is stale: chunk {chunk.chunk_index} is in flight")
    if event.policy_version != chunk.policy_version:
        raise ProtocolError(f"{name} has policy version {event.policy_version}, not {chunk.policy_version}")
    num_new = len(event.token_ids)
    if not 1 <= num_new <= chunk.max_chunk_tokens or len(event.logprobs) != num_new:
        raise ProtocolError(
            f"{name} has {num_new} tokens and {len(event.logprobs)} log-probabilities; 1 to {chunk.max_chunk_tokens} "
            "of both are due"
        )
    _check_expert_ids(event, request, name)
    num_tokens = len(chunk.token_ids) + num_new
    is_at_limit = num_tokens == chunk.max_total_tokens
    # A stop token may be the last one allowed, so "stop" is possible at any length.
    possible = {"stop", "length" if is_at_limit else "chunk"}
    if event.finish_reason not in possible:
        raise ProtocolError(
            f"{name} ended with {event.finish_reason!r} at {num_tokens} of {chunk.max_total_tokens} tokens"
        )
    # The last token is sampled but not yet computed: with its KV, too, the next chunk would have nothing to start from.
    if event.kv is not None and event.kv.num_tokens >= num_tokens:
        raise ProtocolError(f"{name} has KV of {event.kv.num_tokens} tokens, at most {num_tokens - 1} can be computed")


def _check_expert_ids(event: ChunkFinished, request: RolloutRequest, name: str) -> None:
    shape = None if event.expert_ids is None else event.expert_ids.shape
    if shape is not None and shape[0] != len(event.token_ids):
        raise ProtocolError(f"{name} has {len(event.token_ids)} tokens and expert ids of {shape[0]}")
    before = request.expert_id_deltas[0].shape if request.expert_id_deltas else None
    if request.token_deltas and (before and before[1:]) != (shape and shape[1:]):
        raise ProtocolError(f"{name} has expert ids {shape}, the request's first chunk {before}")
