"""What runs on a simulated instance: chunks, counters, and a stretch of equal steps in closed form."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from seer_jax.core.events import ChunkFinished
from seer_jax.core.latency import StepTimeModel
from seer_jax.core.types import KVHandle, RequestChunk


@runtime_checkable
class InstanceTimes(StepTimeModel, Protocol):
    """What an instance's work takes."""

    def prefill_s(self, num_tokens: int, start: int = 0) -> float:
        """Seconds to compute the KV of `num_tokens` tokens from position `start`, in steps that run anyway."""
        ...


@dataclass(kw_only=True, eq=False, slots=True)
class SimChunk:
    """A chunk at an instance.

    Attributes:
        chunk: As the driver sent it.
        order: By priority, then arrival.
        num_new: Tokens that it will generate.
        context: Tokens known, prompt included, fractions of a token while it runs.
        ready_s: When its KV has arrived.
        num_to_prefill: Tokens whose KV must be computed at admission.
        started_s: When it was admitted first; -1 before.
    """

    chunk: RequestChunk
    order: tuple[int, int]
    num_new: int
    context: float
    ready_s: float
    num_to_prefill: int
    started_s: float = -1.0

    def result(self, instance_id: int, true_length: int) -> ChunkFinished:
        """What the instance returns of it, now that it has ended; its request will generate `true_length` tokens."""
        chunk, num_tokens = self.chunk, len(self.chunk.token_ids) + self.num_new
        reason = "chunk" if num_tokens - chunk.num_prompt_tokens < true_length else "stop"
        if num_tokens == chunk.max_total_tokens:
            reason = "length"
        kv = KVHandle(num_tokens=num_tokens - 1, policy_version=chunk.policy_version, ref=instance_id)
        return ChunkFinished(
            instance_id=instance_id,
            request_id=chunk.request_id,
            chunk_index=chunk.chunk_index,
            token_ids=_blank(self.num_new, np.int32),
            logprobs=_blank(self.num_new, np.float32),
            finish_reason=reason,
            policy_version=chunk.policy_version,
            kv=kv if reason == "chunk" else None,
        )


@dataclass(kw_only=True, slots=True)
class SimCounters:
    """What happened at an instance; tokens of growing and reserved chunks alike."""

    num_steps: float = 0.0
    busy_s: float = 0.0
    num_preemptions: int = 0
    num_prefilled_tokens: int = 0
    num_reprefilled_tokens: int = 0
    num_imported_tokens: int = 0
    num_emitted_tokens: float = 0.0
    num_request_steps: float = 0.0
    max_kv_tokens: float = 0.0


@dataclass(kw_only=True, slots=True)
class Segment:
    """Steps of one batch, the time of each of which grows evenly with the context.

    Attributes:
        steps: How many are left.
        step_s: Seconds of the next one.
        growth_s: Seconds that each takes longer than the one before.
    """

    steps: float = 0.0
    step_s: float = 1.0
    growth_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """Time of all that are left."""
        return self.steps * (self.step_s + self.growth_s * self.steps / 2)

    def steps_in(self, elapsed_s: float) -> float:
        """Steps that fit into a time: the root of step_s k + growth_s k^2 / 2 = elapsed_s."""
        if abs(self.growth_s) * self.steps < 1e-9 * self.step_s:
            return min(elapsed_s / self.step_s, self.steps)
        root = math.sqrt(max(0.0, self.step_s**2 + 2 * self.growth_s * elapsed_s))
        return min((root - self.step_s) / self.growth_s, self.steps)

    def take(self, steps: float) -> None:
        """Leave out the first steps."""
        self.steps -= steps
        self.step_s += steps * self.growth_s


_BLANKS: dict[type, np.ndarray] = {}


def _blank(size: int, dtype: type) -> np.ndarray:
    """Zeros, all views of one array: a simulated token has no value."""
    blank = _BLANKS.get(dtype)
    if blank is None or len(blank) < size:
        blank = _BLANKS[dtype] = np.zeros(max(size, 1 << 17), dtype)
    return blank[:size]
