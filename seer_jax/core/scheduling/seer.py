"""Seer's context-aware scheduling of divided rollout (the paper's Algorithm 2)."""

from collections.abc import Mapping
from dataclasses import dataclass

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.placement import InstanceLoad, choose_instance
from seer_jax.core.request import RolloutRequest
from seer_jax.core.scheduling.base import PROBE_PRIORITY, REST_PRIORITY, Decision


@dataclass(frozen=True, kw_only=True)
class SeerPolicy:
    """Probes first, then the longest estimate; chunk by chunk, with the whole KV footprint reserved.

    The request is chosen before the instance, so one that fits nowhere now blocks those behind it until pages come
    back: the paper's behaviour, and what keeps long requests from being overtaken for ever by short ones.

    Attributes:
        chunk_size: Tokens generated per chunk.
        starvation_interval: Every so many decisions one goes to the most underserved group; 0 = never. A group with a
            waiting request is then served within `starvation_interval` x (number of groups) decisions.
        prefetch_chunks: Chunks that an instance accepts beyond its slots.
    """

    chunk_size: int
    starvation_interval: int
    prefetch_chunks: int

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Pick a request, then the least loaded instance that has room for its next chunk."""
        request = self._pick_request(buffer)
        if request is None:
            return None
        max_chunk_tokens = min(self.chunk_size, request.remaining_tokens)
        num_tokens = request.num_tokens + max_chunk_tokens
        load = choose_instance(loads.values(), num_tokens, request.instance_id, self.prefetch_chunks)
        if load is None:
            return None
        return Decision(
            request=request,
            instance_id=load.info.instance_id,
            max_chunk_tokens=max_chunk_tokens,
            num_reserved_pages=pages_for_tokens(num_tokens, load.info.page_size),
            priority=PROBE_PRIORITY if request.is_probe else REST_PRIORITY,
        )

    def _pick_request(self, buffer: RequestBuffer) -> RolloutRequest | None:
        if self.starvation_interval and (buffer.num_taken + 1) % self.starvation_interval == 0:
            return buffer.most_underserved()
        return buffer.shortest_probe() or buffer.longest_rest()
