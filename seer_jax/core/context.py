"""What finished requests tell about their siblings: the context manager of Seer (Algorithm 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from seer_jax.core.request import RolloutRequest
from seer_jax.core.types import RequestId


@runtime_checkable
class LengthEstimator(Protocol):
    """Guesses how many tokens a request will have generated in the end."""

    def estimate(self, request: RolloutRequest, longest_finished: int | None) -> int:
        """Estimate a request's final length.

        Args:
            request: An unfinished request.
            longest_finished: Generated tokens of the longest finished request of its group; None if none has finished.

        Returns:
            Generated tokens at the end.
        """
        ...


@dataclass(frozen=True)
class GroupMaxEstimator:
    """The paper's estimate L_g, the longest finished sibling; the generation limit while none has finished.

    A request that already outgrew L_g counts with its own progress: the paper ignores that, and would leave the very
    longest requests behind in the order.
    """

    def estimate(self, request: RolloutRequest, longest_finished: int | None) -> int:
        """Take the larger of L_g and the request's own progress."""
        limit = request.group.sampling.max_tokens
        return max(limit if longest_finished is None else longest_finished, request.num_generated)


@dataclass(frozen=True)
class OracleEstimator:
    """Knows the true lengths: the upper bound that estimates are compared with. For tests and simulation only.

    Args:
        true_lengths: Tokens that each request will generate.
    """

    true_lengths: Mapping[RequestId, int]

    def estimate(self, request: RolloutRequest, longest_finished: int | None) -> int:
        """Look the true length up."""
        return self.true_lengths[request.request_id]


@dataclass(kw_only=True)
class ContextManager:
    """Length context of the groups of one iteration.

    Attributes:
        estimator: Turns the context into an estimate per request.
        longest_finished: L_g of every group with a finished request.
    """

    estimator: LengthEstimator
    longest_finished: dict[int, int] = field(default_factory=dict)

    def observe_finished(self, request: RolloutRequest) -> None:
        """Update L_g of the request's group; estimates of its siblings may change."""
        group_id = request.request_id.group_id
        self.longest_finished[group_id] = max(self.longest_finished.get(group_id, 0), request.num_generated)

    def estimate(self, request: RolloutRequest) -> int:
        """Estimate the final number of generated tokens of an unfinished request."""
        return self.estimator.estimate(request, self.longest_finished.get(request.request_id.group_id))
