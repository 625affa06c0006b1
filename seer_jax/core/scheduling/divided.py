"""Divided rollout in a fixed order of requests: what Seer's context is compared with, from below and from above."""

from collections.abc import Mapping
from dataclasses import dataclass

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad, choose_instance
from seer_jax.core.request import RolloutRequest
from seer_jax.core.scheduling.base import PROBE_PRIORITY, Decision, start_reserved


@dataclass(frozen=True, kw_only=True)
class DividedPolicy:
    """Divided rollout without length context (the paper's "no-context"): chunked and reserved like Seer, no probes.

    The paper gives no order. Here it is that of submission, whatever a request has generated: what was begun is
    finished before something new is, so few paused caches pile up.

    Attributes:
        chunk_size: Tokens generated per chunk.
        prefetch_chunks: Chunks that an instance accepts beyond its slots.
    """

    chunk_size: int
    prefetch_chunks: int

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick the first to arrive; it blocks those behind it if it fits nowhere."""
        return _place(buffer.first_arrived(), loads, self.chunk_size, self.prefetch_chunks)


@dataclass(frozen=True, kw_only=True)
class OraclePolicy:
    """The upper bound of what length context can give: the longest of all first, no probes.

    Longest by the driver's estimator, which must be an `OracleEstimator`. For tests and simulation: nobody knows the
    true lengths of a real rollout.

    Attributes:
        chunk_size: Tokens generated per chunk.
        prefetch_chunks: Chunks that an instance accepts beyond its slots.
    """

    chunk_size: int
    prefetch_chunks: int

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick the longest; it blocks those behind it if it fits nowhere."""
        return _place(buffer.longest(), loads, self.chunk_size, self.prefetch_chunks)


def _place(
    request: RolloutRequest | None, loads: Mapping[int, InstanceLoad], chunk_size: int, prefetch_chunks: int
) -> Decision | None:
    if request is None:
        return None
    max_chunk_tokens = min(chunk_size, request.remaining_tokens)
    num_tokens = request.num_tokens + max_chunk_tokens
    load = choose_instance(loads.values(), num_tokens, request.instance_id, prefetch_chunks)
    return None if load is None else start_reserved(request, load, max_chunk_tokens, PROBE_PRIORITY)
