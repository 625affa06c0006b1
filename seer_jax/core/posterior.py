"""A length estimate that uses all siblings, finished or not, and the request's own progress.

The log of a response's length over its limit is taken as `mu + b + e`: `b` is normal between groups, `e` normal within.
A finished sibling shows its value; one that still runs or waits has at least its progress (it is censored), which
corrects the bias of "the longest that has finished": who finishes first is short. Not in the paper.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

from seer_jax.core.context import GroupContext, LengthContext, LengthModel, LengthMoments
from seer_jax.core.request import RequestState, RolloutRequest

ESTIMATE_QUANTILE = 0.5
"""Quantile of a request's own final length that it is ordered by: the median. Makespans of a toy cluster with 0.3, 0.5,
0.75, 0.9 and 0.97 lay within 1 % of each other (six seeds), less than one seed differs from another."""
PRIOR_MEAN_SHARE = 1 / 3
"""Mean length over limit before anything has finished; the paper's workloads have 0.19, 0.34 and 0.40."""
PRIOR_SD_BETWEEN, PRIOR_SD_WITHIN = 0.43, 0.33
"""Of log lengths, between and within groups: AIME problems, 596 x 8 samples of a distilled 1.5B model."""
PRIOR_WEIGHT = 16
"""Finished requests that the priors count as."""
MIN_BETWEEN = 0.1
"""Least variance between groups, in that within: a group says something even where few have finished."""
MODEL_GROWTH = 1.5
"""The model is remade when there are so many times the finished requests that it was made from, and a prior's more."""
NEWTON_STEPS = 3
"""At most so many steps a refresh; it starts where the last one ended."""
TOLERANCE = 0.02
"""A group's mean is not moved by less; 0.02 in a log length is 2 %."""
UNINFORMATIVE = -2.0
"""Progress so many standard deviations from the group's mean says next to nothing: its hazard is below 0.06."""

_STANDARD = NormalDist()


@dataclass(frozen=True)
class PosteriorEstimator:
    """Bayesian estimate of a request's length from its group.

    Mean and spreads of the model are learnt from the iteration's finished requests, O(1) each, and from priors relative
    to the limit. A group's mean is refreshed, O(group), when one of its requests finishes or comes back with progress
    that says something; those of all groups, when the finished requests are `MODEL_GROWTH` times what the model was
    made from: only estimates under one model can be compared.
    """

    option: ClassVar[str | None] = "posterior"

    def observe(self, request: RolloutRequest, lengths: LengthContext) -> Collection[int]:
        """Note progress or final length, and refresh what that may move."""
        request_id, num_generated, group = request.request_id, request.num_generated, lengths.group_of(request)
        if lengths.model is None:
            lengths.model = _make_model(lengths.moments)
        if num_generated == 0:
            if group.mean_log is None:
                group.mean_log = lengths.model.mean
            return ()
        log = math.log(num_generated / request.group.sampling.max_tokens)
        if request.state is RequestState.FINISHED:
            group.progress_logs.pop(request_id.index, None)
            lengths.moments.add(log, group)
            if lengths.moments.num_finished >= MODEL_GROWTH * lengths.model.num_finished + PRIOR_WEIGHT:
                lengths.model = _make_model(lengths.moments)
                for other in lengths.groups.values():
                    other.mean_log = _mean_log(other, lengths.model)
                return lengths.groups.keys()
        else:
            group.progress_logs[request_id.index] = log
            assert group.mean_log is not None
            if log < group.mean_log + UNINFORMATIVE * math.sqrt(lengths.model.within):
                return ()
        mean_log = _mean_log(group, lengths.model)
        if group.mean_log is not None and abs(mean_log - group.mean_log) < TOLERANCE:
            return ()  # Re-ordering a group costs more than so small a change is worth.
        group.mean_log = mean_log
        return (request_id.group_id,)

    def estimate(self, request: RolloutRequest, lengths: LengthContext) -> int:
        """Take a quantile of the own length, given that it exceeds the own progress."""
        limit, num_generated = request.group.sampling.max_tokens, request.num_generated
        mean, model = lengths.group_of(request).mean_log, lengths.model
        assert mean is not None and model is not None
        sd, tail = math.sqrt(model.within), 1.0
        if num_generated:
            deviation = (math.log(num_generated / limit) - mean) / sd
            tail = 0.5 * math.erfc(min(deviation, 30.0) / math.sqrt(2))
        log = mean - sd * _STANDARD.inv_cdf((1 - ESTIMATE_QUANTILE) * tail)
        return max(num_generated, int(limit * math.exp(min(log, 0.0))))


def _make_model(moments: LengthMoments) -> LengthModel:
    """Weigh what finished with the priors."""
    within, between = PRIOR_SD_WITHIN**2, PRIOR_SD_BETWEEN**2
    num_finished, weight = moments.num_finished, PRIOR_WEIGHT + moments.num_finished
    prior_mean = math.log(PRIOR_MEAN_SHARE) - (within + between) / 2
    total = (PRIOR_WEIGHT * (within + between) + moments.squares) / weight
    within = (PRIOR_WEIGHT * within + moments.squares_within) / (PRIOR_WEIGHT + moments.num_within)
    return LengthModel(
        mean=(PRIOR_WEIGHT * prior_mean + num_finished * moments.mean) / weight,
        between=max(total - within, MIN_BETWEEN * within),
        within=within,
        num_finished=num_finished,
    )


def _mean_log(group: GroupContext, model: LengthModel) -> float:
    """Mode of the posterior of a group's mean: Newton's steps on a concave function from where it was."""
    sd, estimate = math.sqrt(model.within), model.mean if group.mean_log is None else group.mean_log
    for _ in range(NEWTON_STEPS):
        slope = (model.mean - estimate) / model.between
        slope += group.num_finished * (group.mean_finished_log - estimate) / model.within
        curvature = 1 / model.between + group.num_finished / model.within
        for log in group.progress_logs.values():
            deviation = (log - estimate) / sd
            if deviation > UNINFORMATIVE:
                hazard = _hazard(deviation)
                slope += hazard / sd
                curvature += hazard * (hazard - deviation) / model.within
        step = slope / curvature
        estimate += step
        if abs(step) < TOLERANCE:
            break
    return estimate


def _hazard(x: float) -> float:
    """Density over upper tail of the standard normal: how far a value known to exceed `x` lies above 0 on average."""
    if x > 8:
        return x + 1 / x
    return math.exp(-x * x / 2) * math.sqrt(2 / math.pi) / math.erfc(x / math.sqrt(2))
