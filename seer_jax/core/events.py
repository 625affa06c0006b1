"""What happens to the driver. `RolloutDriver.handle` turns each event into commands."""

from dataclasses import dataclass

from seer_jax.core.types import (
    ExpertIds,
    InstanceInfo,
    InstanceStatus,
    KVHandle,
    Logprobs,
    RequestId,
    RolloutGroup,
    TokenIds,
)


@dataclass(frozen=True, kw_only=True)
class InstanceJoined:
    """An instance is ready and empty."""

    info: InstanceInfo
    policy_version: int


@dataclass(frozen=True, kw_only=True)
class InstanceLost:
    """An instance is gone with all that ran on it; its requests resume from their last returned token."""

    instance_id: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupsSubmitted:
    """The prompt groups of one iteration; all of them, so that policies see the whole iteration."""

    groups: tuple[RolloutGroup, ...]
    policy_version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkFinished:
    """A chunk ended.

    Attributes:
        instance_id: Where it ran.
        request_id: The request.
        chunk_index: Index of the chunk within the request.
        token_ids: Tokens that this chunk generated.
        logprobs: One for each of them.
        finish_reason: "stop", "length" (both end the request) or "chunk" (goes back to the buffer).
        policy_version: Weights that ran.
        expert_ids: Those behind each of them, see `Sample`; None unless `engine.expert_ids`.
        kv: Where the KV of the paused request is; None when the request ended or the KV was not kept.
    """

    instance_id: int
    request_id: RequestId
    chunk_index: int
    token_ids: TokenIds
    logprobs: Logprobs
    finish_reason: str
    policy_version: int
    expert_ids: ExpertIds | None = None
    kv: KVHandle | None = None


@dataclass(frozen=True, kw_only=True)
class InstanceReport:
    """Telemetry; changes no decision of a policy that reserves, feeds displays and metrics."""

    status: InstanceStatus


Event = InstanceJoined | InstanceLost | GroupsSubmitted | ChunkFinished | InstanceReport
