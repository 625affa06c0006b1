"""A length estimate that uses all siblings, finished or not, and the request's own progress.

The log of a response's length over its limit is taken as `mu + b + e`: `b` is normal between groups, `e` normal within.
A finished sibling shows its value; one that still runs or waits has at least its progress (it is censored), which
corrects the bias of "the longest that has finished": who finishes first is short. Not in the paper.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

from seer_jax.core.context import GroupContext, LengthMoments
from seer_jax.core.request import RequestState, RolloutRequest

ESTIMATE_QUANTILE = 0.5
"""Quantile of a request's own final length that it is ordered by."""
PRIOR_MEAN_SHARE = 1 / 3
"""Mean length over limit before anything has finished; the paper's workloads have 0.19, 0.34 and 0.40."""
PRIOR_SD_BETWEEN, PRIOR_SD_WITHIN = 0.43, 0.33
"""Of log lengths, between and within groups: AIME problems, 596 x 8 samples of a distilled 1.5B model."""
PRIOR_WEIGHT = 16
"""Finished requests that the priors count as."""
NEWTON_STEPS, NEWTON_TOLERANCE = 3, 0.01
"""At most so many steps a refresh; it starts where the last one ended. 0.01 in a log length is 1 %."""
UNINFORMATIVE = -2.0
"""Progress so many standard deviations from the group's mean says next to nothing: its hazard is below 0.06."""

_STANDARD = NormalDist()


@dataclass(frozen=True)
class PosteriorEstimator:
    """Bayesian estimate of a request's length from its group.

    Means and spreads are learnt from the iteration's finished requests, O(1) each, from priors relative to the limit. A
    group's mean is refreshed, O(group), when one of its requests finishes, and when one comes back with progress that
    says something or the iteration's finished requests have doubled since.
    """

    option: ClassVar[str | None] = "posterior"

    def observe(self, request: RolloutRequest, group: GroupContext, moments: LengthMoments) -> bool:
        """Note progress or final length, and refresh the group's mean if that may move it."""
        index, num_generated = request.request_id.index, request.num_generated
        log = math.log(num_generated / request.group.sampling.max_tokens) if num_generated else None
        if request.state is RequestState.FINISHED:
            assert log is not None
            group.progress_logs.pop(index, None)
            moments.add(log, group)
        elif log is not None:
            group.progress_logs[index] = log
            is_known = moments.num_finished < 2 * group.num_known + PRIOR_WEIGHT
            if is_known and group.mean_log is not None and log < group.mean_log + UNINFORMATIVE * group.sd_log:
                return False
        elif group.mean_log is not None:
            return False
        _refresh(group, moments)
        return True

    def estimate(self, request: RolloutRequest, group: GroupContext) -> int:
        """Take a quantile of the own length, given that it exceeds the own progress."""
        limit, num_generated = request.group.sampling.max_tokens, request.num_generated
        assert group.mean_log is not None
        tail = 1.0
        if num_generated:
            deviation = (math.log(num_generated / limit) - group.mean_log) / group.sd_log
            tail = 0.5 * math.erfc(min(deviation, 30.0) / math.sqrt(2))
        log = group.mean_log - group.sd_log * _STANDARD.inv_cdf((1 - ESTIMATE_QUANTILE) * tail)
        return max(num_generated, int(limit * math.exp(min(log, 0.0))))


def _refresh(group: GroupContext, moments: LengthMoments) -> None:
    """Move the group's mean to the mode of its posterior: Newton's steps on a concave function."""
    prior_within, prior_between = PRIOR_SD_WITHIN**2, PRIOR_SD_BETWEEN**2
    weight = PRIOR_WEIGHT + moments.num_finished
    prior_mean = math.log(PRIOR_MEAN_SHARE) - (prior_within + prior_between) / 2
    mean = (PRIOR_WEIGHT * prior_mean + moments.num_finished * moments.mean) / weight
    total = (PRIOR_WEIGHT * (prior_within + prior_between) + moments.squares) / weight
    within = (PRIOR_WEIGHT * prior_within + moments.squares_within) / (PRIOR_WEIGHT + moments.num_within)
    between = max(total - within, 0.1 * within)
    sd, estimate = math.sqrt(within), mean if group.mean_log is None else group.mean_log
    for _ in range(NEWTON_STEPS):
        slope = (mean - estimate) / between + group.num_finished * (group.mean_finished_log - estimate) / within
        curvature = 1 / between + group.num_finished / within
        for log in group.progress_logs.values():
            deviation = (log - estimate) / sd
            if deviation > UNINFORMATIVE:
                hazard = _hazard(deviation)
                slope += hazard / sd
                curvature += hazard * (hazard - deviation) / within
        step = slope / curvature
        estimate += step
        if abs(step) < NEWTON_TOLERANCE:
            break
    group.mean_log, group.sd_log, group.num_known = estimate, sd, moments.num_finished


def _hazard(x: float) -> float:
    """Density over upper tail of the standard normal: how far a value known to exceed `x` lies above 0 on average."""
    if x > 8:
        return x + 1 / x
    return math.exp(-x * x / 2) * math.sqrt(2 / math.pi) / math.erfc(x / math.sqrt(2))
