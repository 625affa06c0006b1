"""What is known about the lengths of a group: the context manager of Seer (Algorithm 2).

Estimators hold settings only. What they learn is in `LengthContext`: plain data of one iteration, copied by snapshots.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

from seer_jax.core.request import RequestState, RolloutRequest
from seer_jax.core.types import RequestId


@dataclass(kw_only=True, slots=True)
class GroupContext:
    """What one group has told so far; all but the first attribute are kept by estimators that ask for more.

    Logs are of length over limit, natural.

    Attributes:
        longest_finished: L_g, generated tokens of the longest finished request; None if none has finished.
        num_finished: Finished requests.
        mean_finished_log: Mean of their logs.
        progress_logs: By index, of the unfinished requests that have generated something.
        mean_log: Estimate of the mean of the group's logs; None until it is first made.
    """

    longest_finished: int | None = None
    num_finished: int = 0
    mean_finished_log: float = 0.0
    progress_logs: dict[int, float] = field(default_factory=dict)
    mean_log: float | None = None

    def copy(self) -> "GroupContext":
        """Copy all."""
        return replace(self, progress_logs=dict(self.progress_logs))


@dataclass(kw_only=True, slots=True)
class LengthMoments:
    """Running moments of the logs of the iteration's finished requests.

    Attributes:
        num_finished: How many.
        mean: Their mean.
        squares: Sum of squared deviations from it.
        squares_within: Sum of squared deviations from the means of their groups.
        num_within: Degrees of freedom of that sum: finished requests beyond the first of each group.
    """

    num_finished: int = 0
    mean: float = 0.0
    squares: float = 0.0
    squares_within: float = 0.0
    num_within: int = 0

    def add(self, log: float, group: GroupContext) -> None:
        """Add a finished request to these moments and to those of its group."""
        self.num_finished += 1
        deviation = log - self.mean
        self.mean += deviation / self.num_finished
        self.squares += deviation * (log - self.mean)
        group.num_finished += 1
        deviation = log - group.mean_finished_log
        group.mean_finished_log += deviation / group.num_finished
        self.squares_within += deviation * (log - group.mean_finished_log)
        self.num_within += group.num_finished > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthModel:
    """Logs are normal between groups and within them.

    Attributes:
        mean: Mean of all.
        between: Variance of the groups' means.
        within: Variance inside a group.
        num_finished: Finished requests that it was made from.
    """

    mean: float
    between: float
    within: float
    num_finished: int


@dataclass(kw_only=True, slots=True)
class LengthContext:
    """Everything that was learnt about lengths in one iteration.

    Attributes:
        groups: Context of every group, by id.
        moments: Of all finished requests.
        model: What all current estimates assume; None until it is first made.
    """

    groups: dict[int, GroupContext] = field(default_factory=dict)
    moments: LengthMoments = field(default_factory=LengthMoments)
    model: LengthModel | None = None

    def group_of(self, request: RolloutRequest) -> GroupContext:
        """The context of a request's group, which is empty at first."""
        return self.groups.setdefault(request.request_id.group_id, GroupContext())

    def copy(self) -> "LengthContext":
        """Copy all."""
        groups = {group_id: group.copy() for group_id, group in self.groups.items()}
        return LengthContext(groups=groups, moments=replace(self.moments), model=self.model)


@runtime_checkable
class LengthEstimator(Protocol):
    """Guesses how many tokens a request will have generated in the end. Holds settings only.

    Attributes:
        option: Name under which its effect is counted (`Decision.fired`); None for an estimate that is no option.
    """

    option: ClassVar[str | None]

    def observe(self, request: RolloutRequest, lengths: LengthContext) -> Collection[int]:
        """Take note of a request that came (back) to the buffer or, as its `state` says, finished.

        Args:
            request: The request.
            lengths: Context of the iteration; `longest_finished` is up to date, the rest is the estimator's to keep.

        Returns:
            Ids of the groups whose unfinished requests may be estimated otherwise now.
        """
        ...

    def estimate(self, request: RolloutRequest, lengths: LengthContext) -> int:
        """Estimate a request's final length; depends on nothing but the arguments.

        Args:
            request: An unfinished request.
            lengths: Context of the iteration; not changed.

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

    option: ClassVar[str | None] = None

    def observe(self, request: RolloutRequest, lengths: LengthContext) -> Collection[int]:
        """Only a finished request changes L_g."""
        return (request.request_id.group_id,) if request.state is RequestState.FINISHED else ()

    def estimate(self, request: RolloutRequest, lengths: LengthContext) -> int:
        """Take the larger of L_g and the request's own progress."""
        longest = lengths.group_of(request).longest_finished
        return max(request.group.sampling.max_tokens if longest is None else longest, request.num_generated)


@dataclass(frozen=True)
class OracleEstimator:
    """Knows the true lengths: the upper bound that estimates are compared with. For tests and simulation only.

    Args:
        true_lengths: Tokens that each request will generate.
    """

    true_lengths: Mapping[RequestId, int]

    option: ClassVar[str | None] = None

    def observe(self, request: RolloutRequest, lengths: LengthContext) -> Collection[int]:
        """Learn nothing."""
        return ()

    def estimate(self, request: RolloutRequest, lengths: LengthContext) -> int:
        """Look the true length up."""
        return self.true_lengths[request.request_id]


_GROUP_MAX = GroupMaxEstimator()


@dataclass(kw_only=True)
class ContextManager:
    """Length context of the groups of one iteration.

    Attributes:
        estimator: Turns the context into an estimate per request.
        lengths: The context.
    """

    estimator: LengthEstimator
    lengths: LengthContext = field(default_factory=LengthContext)

    def observe(self, request: RolloutRequest) -> Collection[int]:
        """Take note of a request that came (back) to the buffer or finished.

        Returns:
            Ids of the groups whose unfinished requests may be estimated otherwise now.
        """
        if request.state is RequestState.FINISHED:
            group = self.lengths.group_of(request)
            group.longest_finished = max(group.longest_finished or 0, request.num_generated)
        return self.estimator.observe(request, self.lengths)

    def estimate(self, request: RolloutRequest) -> int:
        """Estimate the final number of generated tokens of an unfinished request."""
        return self.estimator.estimate(request, self.lengths)

    def fired(self, request: RolloutRequest) -> tuple[str, ...]:
        """Name the estimator if it is an option and its estimate of the request differs from the paper's."""
        option = self.estimator.option
        if option is None or self.estimate(request) == _GROUP_MAX.estimate(request, self.lengths):
            return ()
        return (option,)
