"""Statistics of verification against a plain count, and what the drafter makes of them."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.draft import acceptance, kernels
from seer_jax.core.draft.acceptance import PRIOR, PRIOR_ACCEPTANCE, AcceptanceStats
from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.speculate import UNCALIBRATED, DraftBatch, SpeculationArgs, speculate

MAX_DEPTH = 3


@st.composite
def outcomes(draw: st.DrawFn) -> tuple:
    """Up to three random trees of few tokens, the tokens emitted along each, and which requests are probes."""
    num_requests, width = draw(st.integers(1, 3)), 6
    batch = DraftBatch.empty(num_requests, width)
    emitted = np.full((num_requests, width + 1), -7, np.int32)
    counts = np.zeros(num_requests, np.int32)
    for r in range(num_requests):
        children = defaultdict(set)
        for node in range(draw(st.integers(0, width))):
            parent = draw(st.integers(-1, node - 1))
            token = draw(st.integers(0, 3))
            if token in children[parent]:
                break
            children[parent].add(token)
            batch.token_ids[r, node], batch.parents[r, node] = token, parent
            batch.conditionals[r, node] = draw(st.floats(0.0, 1.0, width=32))
            batch.bins[r, node] = draw(st.sampled_from([0, 1, kernels.NUM_BINS - 1]))
            batch.num_nodes[r] = node + 1
        tokens = draw(st.lists(st.integers(0, 3), min_size=1, max_size=width + 1))
        emitted[r, : len(tokens)], counts[r] = tokens, len(tokens)
    num_verified = np.array([draw(st.integers(0, int(count))) for count in batch.num_nodes], np.int32)
    is_probe = np.array([draw(st.booleans()) for _ in range(num_requests)])
    return is_probe, batch, num_verified, emitted, counts


@given(st.lists(outcomes(), min_size=1, max_size=3))
def test_statistics_are_those_of_a_walk_along_the_emitted_tokens(steps: list[tuple]) -> None:
    stats = AcceptanceStats(MAX_DEPTH)
    by_bin = defaultdict(lambda: [0.0, 0])
    by_position = defaultdict(lambda: [0, 0])
    for step in steps:
        stats.record(*step)
        is_probe, batch, num_verified, emitted, counts = step
        for r in range(len(counts)):
            last = -1
            for position, token in enumerate(emitted[r, : counts[r]]):
                children = [n for n in range(num_verified[r]) if batch.parents[r, n] == last]
                right = [n for n in children if batch.token_ids[r, n] == token]
                for n in children:
                    pair = by_bin[int(batch.bins[r, n])]
                    pair[0] += batch.conditionals[r, n]
                    pair[1] += n in right
                if children:
                    by_position[bool(is_probe[r]), position][0] += 1
                    by_position[bool(is_probe[r]), position][1] += len(right)
                if not right:
                    break
                last = right[0]
    known = {key: pair for key, pair in by_position.items() if key[1] < MAX_DEPTH}
    alpha = (sum(p[1] for p in known.values()) + PRIOR * PRIOR_ACCEPTANCE) / (sum(p[0] for p in known.values()) + PRIOR)
    assert stats.alpha == pytest.approx(alpha)
    for place in range(kernels.NUM_BINS):
        expected, successes = by_bin[place]
        assert stats.calibration[place] == pytest.approx((successes + PRIOR) / (expected + PRIOR), rel=1e-5)
    for is_probe in (False, True):
        for position in range(MAX_DEPTH):
            trials, successes = known.get((is_probe, position), (0, 0))
            assert stats.beta(is_probe)[position] == pytest.approx((successes + PRIOR * alpha) / (trials + PRIOR))


BIN = 3


def record_lines(stats: AcceptanceStats, conditional: float, is_right: np.ndarray) -> None:
    """A step in which the only node of every draft, token 1 of `BIN`, is right or wrong."""
    count = len(is_right)
    batch = DraftBatch.empty(count, 1)
    batch.token_ids[:], batch.parents[:], batch.bins[:] = 1, -1, BIN
    batch.conditionals[:], batch.num_nodes[:] = conditional, 1
    emitted = np.where(is_right, 1, 2).astype(np.int32)[:, None]
    ones = np.ones(count, np.int32)
    stats.record(np.zeros(count, bool), batch, ones, emitted, ones)


def test_nothing_seen_is_the_prior() -> None:
    stats = AcceptanceStats(4)
    assert stats.calibration.tolist() == [1.0] * kernels.NUM_BINS and stats.calibration.dtype == np.float32
    assert stats.beta(True).tolist() == stats.beta(False).tolist() == [PRIOR_ACCEPTANCE] * 4
    assert stats.alpha == PRIOR_ACCEPTANCE


def test_calibration_and_beta_converge_to_the_truth_and_follow_it() -> None:
    stats, rng = AcceptanceStats(4), np.random.default_rng(0)
    for truth in (0.45, 0.9):
        for _ in range(100):
            record_lines(stats, 0.7, rng.random(64) < truth)
        assert 0.7 * stats.calibration[BIN] == pytest.approx(truth, abs=0.07)
        assert stats.beta(False)[0] == pytest.approx(truth, abs=0.07)
    assert np.delete(stats.calibration, BIN).tolist() == [1.0] * (kernels.NUM_BINS - 1)
    # What was never seen is taken to be as good as the rest.
    assert stats.beta(True).tolist() == [stats.alpha] * 4 and stats.alpha == pytest.approx(0.9, abs=0.07)


def test_counts_stay_below_the_memory() -> None:
    stats = AcceptanceStats(1)
    for _ in range(1000):
        record_lines(stats, 1.0, np.ones(64, bool))
    assert stats._bins.max() <= acceptance.MEMORY and stats._positions.max() <= acceptance.MEMORY
    assert stats._bins[BIN, 0] > acceptance.MEMORY / 3


def test_relaxing_forgets_a_bad_start_some_day() -> None:
    stats = AcceptanceStats(2)
    for _ in range(50):
        record_lines(stats, 0.7, np.zeros(64, bool))
    bad = stats.calibration.min()
    assert bad < 0.05 and stats.beta(False)[0] < 0.05
    stats.relax()
    assert bad < stats.calibration.min() < 0.05  # one step is not much
    for _ in range(400):
        stats.relax()
    assert stats.calibration.min() > 0.95 and stats.beta(False)[0] > 0.45


appends = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=6)), max_size=14)
factors = st.lists(st.floats(0.25, 4, width=32), min_size=kernels.NUM_BINS, max_size=kernels.NUM_BINS)


def grow(deltas: list[tuple[int, list[int]]]) -> SuffixAutomaton:
    automaton = SuffixAutomaton(5)
    for request in range(3):
        automaton.open(request)
    for request, tokens in deltas:
        automaton.append(request, np.array(tokens, np.int32))
    return automaton


@given(appends, factors, st.integers(1, 4))
def test_the_first_nodes_of_a_calibrated_draft_are_its_best_and_a_tree(
    deltas: list[tuple[int, list[int]]], calibration: list[float], top_k: int
) -> None:
    factor, width = np.array(calibration, np.float32), 10
    batch = speculate(grow(deltas), [0, 1, 2], width, SpeculationArgs(top_k=top_k), factor)
    for r in range(3):
        count = batch.num_nodes[r]
        scores, parents = batch.scores[r, :count], batch.parents[r, :count]
        assert np.all(np.diff(scores) <= 0) and np.all(parents < np.arange(count))
        for node in range(count):
            calibrated = min(batch.conditionals[r, node] * factor[batch.bins[r, node]], 1)
            above = scores[parents[node]] if parents[node] >= 0 else 1
            assert scores[node] == pytest.approx(above * calibrated, rel=1e-5)
            if parents[node] < 0:
                assert batch.bins[r, node] == kernels.bin_of(int(batch.match_length[r]))
            else:  # the context grows by a token, or is cut to what something followed
                assert batch.bins[r, node] <= batch.bins[r, parents[node]] + 1


@given(appends)
def test_no_calibration_takes_the_counts_at_their_word(deltas: list[tuple[int, list[int]]]) -> None:
    automaton, args = grow(deltas), SpeculationArgs(top_k=2)
    plain, ones = (speculate(automaton, [0, 1, 2], 8, args, calibration) for calibration in (None, UNCALIBRATED))
    for r in range(3):
        count = plain.num_nodes[r]
        for name in ("token_ids", "parents", "scores", "conditionals"):
            assert getattr(plain, name)[r, :count].tolist() == getattr(ones, name)[r, :count].tolist()
        product: dict[int, float] = {-1: 1.0}
        for node in range(count):
            product[node] = product[int(plain.parents[r, node])] * plain.conditionals[r, node]
            assert plain.scores[r, node] == pytest.approx(product[node], rel=1e-5)


def test_calibration_changes_what_is_drafted() -> None:
    automaton = SuffixAutomaton()
    for request in range(4):
        automaton.open(request)
    # 5 is followed by 6 in two of three cases, 5 6 then by 9.
    for request, tokens in enumerate([[5, 6, 9], [5, 6, 9], [5, 7, 8], [5]]):
        automaton.append(request, np.array(tokens, np.int32))
    args, calibration = SpeculationArgs(top_k=2), UNCALIBRATED.copy()
    assert speculate(automaton, [3], 3, args).token_ids[0].tolist() == [6, 9, 7]
    calibration[kernels.bin_of(2)] = 0.25
    assert speculate(automaton, [3], 3, args, calibration).token_ids[0].tolist() == [6, 7, 9]
