"""One response in the making: the mutable progress of a request, owned by the driver."""

from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from seer_jax.core.types import ExpertIds, KVHandle, Logprobs, RequestId, RolloutGroup, Sample, TokenIds, sampling_key


class RequestState(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    """In the buffer, to be scheduled."""
    RUNNING = "running"
    """One chunk of it is at an instance."""
    FINISHED = "finished"
    """Stopped or at its limit."""


@dataclass(kw_only=True, eq=False, slots=True)
class RolloutRequest:
    """Progress of one of the responses to a prompt.

    Attributes:
        request_id: Its name.
        group: Prompt, sampling parameters and siblings' number.
        arrival: Position among all requests of the iteration; unique, the last tie-break everywhere.
        group_position: Position of its group among all groups of the iteration.
        sampling_key: 64 bits that key its randomness.
        is_probe: Whether Seer runs it first to learn the group's length (the paper's speculative request).
        state: Waiting, running or finished.
        token_deltas: Generated tokens, one array per returned chunk.
        logprob_deltas: Their log-probabilities, likewise.
        expert_id_deltas: Their expert ids, likewise; empty if not asked for.
        num_generated: Tokens in `token_deltas`.
        num_chunks: Chunks started, those lost with an instance included; also the index of the next one.
        instance_id: Where its last chunk was sent; None before the first.
        kv: KV of a prefix and where it is; an offer that may turn out to be gone, which costs a re-prefill.
        finish_reason: "stop" or "length" once finished.
    """

    request_id: RequestId
    group: RolloutGroup
    arrival: int
    group_position: int
    sampling_key: int
    is_probe: bool
    state: RequestState = RequestState.WAITING
    token_deltas: list[TokenIds] = field(default_factory=list)
    logprob_deltas: list[Logprobs] = field(default_factory=list)
    expert_id_deltas: list[ExpertIds] = field(default_factory=list)
    num_generated: int = 0
    num_chunks: int = 0
    instance_id: int | None = None
    kv: KVHandle | None = None
    finish_reason: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.group.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.group.prompt_token_ids) + self.num_generated

    @property
    def max_total_tokens(self) -> int:
        """Tokens at most, prompt included."""
        return len(self.group.prompt_token_ids) + self.group.sampling.max_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens that may still be generated."""
        return self.group.sampling.max_tokens - self.num_generated

    def append(self, token_ids: TokenIds, logprobs: Logprobs, expert_ids: ExpertIds | None = None) -> None:
        """Add what a chunk generated.

        Args:
            token_ids: int32 [n].
            logprobs: float32 [n].
            expert_ids: int16 [n, MoE layers, experts per token], or None in all chunks.
        """
        self.token_deltas.append(token_ids)
        self.logprob_deltas.append(logprobs)
        if expert_ids is not None:
            self.expert_id_deltas.append(expert_ids)
        self.num_generated += len(token_ids)

    def token_ids(self) -> TokenIds:
        """Concatenate prompt and generated tokens: int32 [num_tokens]."""
        return np.concatenate([self.group.prompt_token_ids, *self.token_deltas], dtype=np.int32)

    def to_sample(self, policy_version: int) -> Sample:
        """Turn a finished request into what the reward and the learner get.

        Args:
            policy_version: Weights of the iteration, which produced every token.
        """
        assert self.state is RequestState.FINISHED and self.finish_reason is not None
        return Sample(
            request_id=self.request_id,
            prompt_token_ids=self.group.prompt_token_ids,
            token_ids=np.concatenate(self.token_deltas, dtype=np.int32),
            logprobs=np.concatenate(self.logprob_deltas, dtype=np.float32),
            finish_reason=self.finish_reason,
            policy_version=policy_version,
            num_chunks=self.num_chunks,
            expert_ids=np.concatenate(self.expert_id_deltas) if self.expert_id_deltas else None,
        )

    def copy(self) -> "RolloutRequest":
        """Copy the progress; the arrays are shared, since nobody writes to them."""
        return replace(
            self,
            token_deltas=list(self.token_deltas),
            logprob_deltas=list(self.logprob_deltas),
            expert_id_deltas=list(self.expert_id_deltas),
        )


def split_groups(groups: tuple[RolloutGroup, ...]) -> list[RolloutRequest]:
    """Split prompt groups into requests, the first half of divided rollout.

    Args:
        groups: The groups of one iteration, in the order of submission.

    Returns:
        Group by group, `group_size` requests each; index 0 is the group's probe.
    """
    requests = []
    for group_position, group in enumerate(groups):
        for index in range(group.group_size):
            request_id = RequestId(group.group_id, index)
            request = RolloutRequest(
                request_id=request_id,
                group=group,
                arrival=len(requests),
                group_position=group_position,
                sampling_key=sampling_key(group.sampling.seed, group.iteration, request_id),
                is_probe=index == 0,
            )
            requests.append(request)
    return requests
