"""The posterior estimate: closer to the true lengths than the longest finished sibling, and what it is made of."""

import math

import numpy as np
import pytest

from seer_jax.core.context import ContextManager, GroupContext, GroupMaxEstimator, LengthEstimator, LengthMoments
from seer_jax.core.posterior import PosteriorEstimator, _hazard
from seer_jax.core.request import RequestState, RolloutRequest, split_groups
from tests.core.fake_cluster import make_group

LIMIT, SIZE = 4096, 8


def draw(num_groups: int, seed: int) -> np.ndarray:
    """True lengths int [num_groups, SIZE]: log-normal with correlation 0.57 inside a group, mean a quarter of LIMIT."""
    rng = np.random.default_rng(seed)
    logs = math.log(LIMIT / 4) - 0.15 + 0.411 * rng.standard_normal((num_groups, 1))
    return np.clip(np.exp(logs + 0.357 * rng.standard_normal((num_groups, SIZE))), 1, LIMIT).astype(int)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties by position."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def advance(context: ContextManager, request: RolloutRequest, num_generated: int, true_length: int) -> None:
    """Let a request have generated so much, or end."""
    request.num_generated = min(num_generated, true_length)
    request.state = RequestState.FINISHED if num_generated >= true_length else RequestState.WAITING
    context.observe(request)


def compare(estimator: LengthEstimator, stage: str, seed: int) -> tuple[float, float]:
    """Mean absolute log error and rank correlation of the estimates of all unfinished requests."""
    true_lengths = draw(150, seed)
    requests = split_groups(tuple(make_group(g, size=SIZE, max_tokens=LIMIT) for g in range(150)))
    context = ContextManager(estimator=estimator)
    for request in requests:
        context.observe(request)
    chunk = 128
    for num_generated in range(chunk, LIMIT + chunk, chunk):
        if stage == "all run" and num_generated > LIMIT / 4:
            break
        for request in requests:
            if request.state is not RequestState.FINISHED and (request.is_probe or stage == "all run"):
                advance(context, request, num_generated, int(true_lengths[request.request_id]))
    unfinished = [request for request in requests if request.state is not RequestState.FINISHED]
    assert len(unfinished) > 300
    estimates = np.array([context.estimate(request) for request in unfinished], float)
    truth = np.array([true_lengths[request.request_id] for request in unfinished], float)
    return float(np.mean(np.abs(np.log(estimates / truth)))), rank_correlation(estimates, truth)


@pytest.mark.parametrize("stage", ["probes ended", "all run"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_closer_to_the_truth_than_the_longest_finished_sibling(stage, seed):
    error, correlation = compare(PosteriorEstimator(), stage, seed)
    error_of_max, correlation_of_max = compare(GroupMaxEstimator(), stage, seed)
    assert error < 0.92 * error_of_max
    # With one finished sibling each and no progress both order groups by that sibling.
    assert correlation > (correlation_of_max + 0.05 if stage == "all run" else correlation_of_max - 0.01)


def test_a_request_that_outgrows_its_finished_siblings_gets_a_longer_estimate_than_its_progress():
    context = ContextManager(estimator=PosteriorEstimator())
    first, second, third = split_groups((make_group(0, size=3, max_tokens=LIMIT),))
    for request in (first, second, third):
        context.observe(request)
    advance(context, first, 300, 300)
    before = context.estimate(third)
    advance(context, second, 900, 2000)
    assert 900 < context.estimate(second) < LIMIT
    assert context.estimate(third) > before, "its running sibling says that the group is long"
    assert context.fired(second) == ("posterior",)


def test_hidden_progress_beyond_every_expectation_is_no_accident():
    context = ContextManager(estimator=PosteriorEstimator())
    [request] = split_groups((make_group(0, size=1, max_tokens=10**9),))
    context.observe(request)
    for num_generated in (1, 10, 10**5, 10**9 - 1):
        advance(context, request, num_generated, 10**9)
        assert num_generated <= context.estimate(request) <= 10**9


def test_hazard_is_the_mean_of_a_normal_above_a_bound():
    values = np.random.default_rng(0).standard_normal(2_000_000)
    for bound in (-3.0, -1.0, 0.0, 1.5):
        assert _hazard(bound) == pytest.approx(values[values > bound].mean(), abs=0.01)
    assert _hazard(8.001) == pytest.approx(_hazard(7.999), rel=1e-3)


def test_moments_equal_those_of_numpy():
    logs = np.random.default_rng(1).normal(size=(5, 4))
    moments = LengthMoments()
    for row in logs:
        group = GroupContext()
        for log in row:
            moments.add(float(log), group)
        assert group.mean_finished_log == pytest.approx(row.mean())
    assert (moments.mean, moments.squares) == pytest.approx((logs.mean(), logs.size * logs.var()))
    assert moments.squares_within == pytest.approx(4 * logs.var(axis=1).sum()) and moments.num_within == 15
