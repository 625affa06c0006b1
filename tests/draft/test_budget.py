"""Draft budgets: Algorithm 1 by hand, the expected gain against every choice there is."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.draft.acceptance import AcceptanceStats
from seer_jax.core.draft.budget import DraftBudgetPolicy, ExpectedGainBudget, FixedBudget, PaperBudget
from seer_jax.core.draft.speculate import DraftBatch
from seer_jax.core.errors import ConfigError

ROOM = 10_000


@dataclass(frozen=True, kw_only=True)
class LinearTimes:
    """`per_step + per_token * tokens`, padded to a multiple of `bucket`; more than `largest` tokens do not fit."""

    per_step: float = 1.0
    per_token: float = 0.0
    bucket: int = 1
    largest: int = ROOM
    plain_factor: float = 1.0

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        return self.plain_factor * (self.per_step + self.per_token * num_seqs)

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        tokens = -(-np.asarray(num_tokens) // self.bucket) * self.bucket
        seconds = np.where(tokens > self.largest, np.inf, self.per_step + self.per_token * tokens)
        return seconds if isinstance(num_tokens, np.ndarray) else float(seconds)


class FixedStats(AcceptanceStats):
    """Given acceptance; the first is that of probes."""

    def __init__(self, probes: list[float], others: list[float], alpha: float) -> None:
        super().__init__(len(probes))
        self._betas = {True: np.array(probes), False: np.array(others)}
        self._alpha = alpha

    def beta(self, is_probe: bool) -> np.ndarray:
        return self._betas[is_probe]

    @property
    def alpha(self) -> float:
        return self._alpha


def make_batch(rows: list[list[float]], width: int = 8) -> DraftBatch:
    """Lines with given scores."""
    batch = DraftBatch.empty(len(rows), width)
    for r, scores in enumerate(rows):
        batch.scores[r, : len(scores)], batch.num_nodes[r] = sorted(scores, reverse=True), len(scores)
        batch.parents[r] = np.arange(-1, width - 1)
    return batch


def probes(*flags: int) -> np.ndarray:
    return np.array(flags, bool)


def allocate(policy: DraftBudgetPolicy, is_probe: np.ndarray, batch: DraftBatch, room: int = ROOM) -> list[int]:
    num_nodes = policy.allocate(is_probe, batch, 100.0, room)
    assert num_nodes.dtype == np.int32 and num_nodes.shape == is_probe.shape
    return num_nodes.tolist()


rows = st.lists(st.lists(st.floats(0.015625, 1.0, width=32), max_size=6), min_size=1, max_size=5)
times = st.builds(
    LinearTimes,
    per_step=st.sampled_from([0.5, 1.0]),
    per_token=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    bucket=st.sampled_from([1, 4, 8]),
    largest=st.sampled_from([6, ROOM]),
    plain_factor=st.sampled_from([0.5, 1.0]),
)


def all_policies(times: LinearTimes) -> list[DraftBudgetPolicy]:
    stats = AcceptanceStats(8)
    return [
        FixedBudget(),
        ExpectedGainBudget(times=times),
        PaperBudget(times=times, stats=stats),
        PaperBudget(times=times, stats=stats, benefit="expected_gain", priority_factor=1.0),
    ]


@given(rows, times, st.integers(0, 20), st.integers(0, 31))
def test_every_policy_keeps_to_the_drafts_and_the_room(
    scores: list[list[float]], times: LinearTimes, room: int, flags: int
) -> None:
    batch, is_probe = make_batch(scores), np.array([flags >> i & 1 for i in range(len(scores))], bool)
    for policy in all_policies(times):
        num_nodes = allocate(policy, is_probe, batch, room)
        assert all(0 <= n <= len(row) for n, row in zip(num_nodes, scores, strict=True))
        assert sum(num_nodes) + len(scores) <= room or not any(num_nodes)


def test_no_drafts_is_no_speculation_for_every_policy() -> None:
    for policy in all_policies(LinearTimes()):
        assert allocate(policy, probes(1, 0), make_batch([[], []])) == [0, 0]


def test_a_wider_batch_is_cut_to_its_first_rows() -> None:
    batch = make_batch([[0.9], [0.8, 0.7], [1.0] * 8])
    for policy in all_policies(LinearTimes()):
        assert allocate(policy, probes(0, 0), batch) == [1, 2]


def test_fixed_takes_everything_or_the_likeliest() -> None:
    batch = make_batch([[0.9, 0.5, 0.1], [0.8, 0.7], []])
    assert allocate(FixedBudget(), probes(0, 0, 1), batch) == [3, 2, 0]
    assert allocate(FixedBudget(), probes(0, 0, 1), batch, room=6) == [1, 2, 0]
    assert allocate(FixedBudget(), probes(0, 0, 1), batch, room=3) == [0, 0, 0]


@given(rows, times, st.integers(2, 40), st.integers(0, 31), st.sampled_from([1.0, 2.0]))
def test_expected_gain_is_the_best_of_all_numbers_of_nodes(
    scores: list[list[float]], times: LinearTimes, room: int, flags: int, priority_factor: float
) -> None:
    batch, is_probe = make_batch(scores), np.array([flags >> i & 1 for i in range(len(scores))], bool)
    policy = ExpectedGainBudget(times=times, priority_factor=priority_factor)
    num_requests, best, best_nodes = len(scores), len(scores) / times.plain_step_s(len(scores), 0), [0] * len(scores)
    nodes = [
        (-float(np.float32(score) * np.float32(priority_factor if is_probe[r] else 1)), r, score)
        for r, row in enumerate(scores)
        for score in sorted(row, reverse=True)
    ]
    nodes.sort(key=lambda node: node[0])
    for n in range(1, len(nodes) + 1):
        seconds = times.verify_step_s(num_requests, num_requests + n, 0.0)
        rate = (num_requests + sum(score for *_, score in nodes[:n])) / seconds
        if num_requests + n <= room and rate > best * (1 + 1e-9):
            best, best_nodes = rate, [sum(node[1] == r for node in nodes[:n]) for r in range(num_requests)]
    assert allocate(policy, is_probe, batch, room) == best_nodes


@given(rows, st.booleans())
def test_speculation_that_cannot_pay_is_off(scores: list[list[float]], is_probe: bool) -> None:
    """A verification of any size that takes longer than all its tokens would plainly."""
    times = LinearTimes(per_step=10, plain_factor=0.1)
    flags = np.full(len(scores), is_probe)
    batch = make_batch(scores)
    for policy in all_policies(times)[1:]:
        assert not any(allocate(policy, flags, batch)), policy


def test_depth_follows_confidence_and_cost() -> None:
    sure, unsure = [0.95, 0.9, 0.85, 0.8], [0.3, 0.1, 0.03, 0.01]
    batch, is_probe = make_batch([sure, unsure, []]), probes(0, 0, 0)
    assert allocate(ExpectedGainBudget(times=LinearTimes()), is_probe, batch) == [4, 4, 0]  # tokens cost nothing
    assert allocate(ExpectedGainBudget(times=LinearTimes(per_token=0.2)), is_probe, batch) == [4, 0, 0]
    assert allocate(ExpectedGainBudget(times=LinearTimes(per_token=0.2)), is_probe, make_batch([unsure] * 3)) == [0] * 3


def test_padding_is_filled() -> None:
    batch, is_probe = make_batch([[0.9, 0.05, 0.05, 0.05, 0.05, 0.05]]), probes(0)
    assert allocate(ExpectedGainBudget(times=LinearTimes(per_token=0.1)), is_probe, batch) == [1]
    assert allocate(ExpectedGainBudget(times=LinearTimes(per_token=0.1, bucket=4)), is_probe, batch) == [3]


def test_probes_go_first_up_to_the_priority_factor() -> None:
    batch, is_probe = make_batch([[0.8, 0.7], [0.5, 0.3]]), probes(0, 1)
    times = LinearTimes(largest=4)  # two nodes fit
    assert allocate(ExpectedGainBudget(times=times, priority_factor=1.0), is_probe, batch) == [2, 0]
    assert allocate(ExpectedGainBudget(times=times, priority_factor=1.5), is_probe, batch) == [1, 1]
    assert allocate(ExpectedGainBudget(times=times, priority_factor=3.0), is_probe, batch) == [0, 2]


ALPHA_BETA = FixedStats([0.75, 0.625, 0.375, 0.125], [0.5, 0.375, 0.3125, 0.25], alpha=0.5)


@pytest.mark.parametrize(
    ("per_token", "gamma"),
    [
        (0.0, 4),  # free tokens: the longest
        # B = 2, T = 1 + 0.1 x 2 (1 + gamma): 1.2 / 1, 1.4 / 1.5, 1.6 / 1.75, 1.8 / 1.875, ...
        (0.1, 2),
        # 2 / 1, 3 / 1.5, ...: no gain
        (0.5, 0),
    ],
)
def test_gamma_star_by_hand(per_token: float, gamma: int) -> None:
    policy = PaperBudget(times=LinearTimes(per_token=per_token), stats=ALPHA_BETA)
    assert policy.best_gamma(2, 100.0, ROOM) == gamma
    assert policy.best_gamma(2, 100.0, 4) == min(gamma, 1)
    assert policy.best_gamma(2, 100.0, 3) == 0


@pytest.mark.parametrize(
    ("benefit", "priority_factor", "gamma", "num_probes", "num_others", "lengths"),
    [
        # Marginal benefits of the paper, per request: probes 1/4 1/8 1/4 1/4, others 1/2 1/8 1/16 1/16.
        # One probe of 4 requests, budget 4, left 3: 1/8 against 2 x 3/2, so the others take all.
        ("paper", 2.0, 1, 1, 3, (1, 1)),
        # Budget 8, left 7: others, left 4; 1/8 against 2 x 3/8: others, left 1, too little for them: probe.
        ("paper", 2.0, 2, 1, 3, (2, 2)),
        # One of each, left 3, no factor: 1/8 against 1/2 and 1/8: others twice; 1/8 against 1/16: probe.
        ("paper", 1.0, 2, 1, 1, (2, 2)),
        # The factor is against the probes: 1/8 is not more than 2 x 1/16.
        ("paper", 2.0, 2, 1, 1, (1, 3)),
        # Expected gain: probes 0.75 0.469 0.176, others 0.5 0.188 0.059. Left 3: 0.469 against 0.5: others; against
        # 0.188: probe; 0.176 against 0.188: others.
        ("expected_gain", 1.0, 2, 1, 1, (2, 2)),
        # 0.469 is not more than 10 x 0.5, 0.188, 0.059.
        ("expected_gain", 10.0, 2, 1, 1, (1, 3)),
        # Traps. gamma* = 0 disables, with and without probes.
        ("paper", 2.0, 0, 1, 3, (0, 0)),
        ("paper", 2.0, 0, 0, 4, (0, 0)),
        # A class without requests gets nothing and the other one gets all.
        ("paper", 2.0, 3, 0, 4, (0, 3)),
        ("paper", 2.0, 3, 4, 0, (3, 0)),
        # Nothing is left over when the others have all they can.
        ("paper", 2.0, 4, 2, 1, (4, 4)),
        ("expected_gain", 2.0, 4, 1, 2, (4, 4)),
    ],
)
def test_algorithm_1_by_hand(
    benefit: str, priority_factor: float, gamma: int, num_probes: int, num_others: int, lengths: tuple[int, int]
) -> None:
    policy = PaperBudget(times=LinearTimes(), stats=ALPHA_BETA, priority_factor=priority_factor, benefit=benefit)
    assert policy.split(gamma, num_probes, num_others) == lengths


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.sampled_from(["paper", "expected_gain"]))
def test_algorithm_1_spends_its_budget(gamma: int, num_probes: int, num_others: int, benefit: str) -> None:
    policy = PaperBudget(times=LinearTimes(), stats=ALPHA_BETA, benefit=benefit)
    gamma_probe, gamma_other = policy.split(gamma, num_probes, num_others)
    left = gamma * (num_probes + num_others) - gamma_probe * num_probes - gamma_other * num_others
    assert left >= 0
    for size, length in ((num_probes, gamma_probe), (num_others, gamma_other)):
        assert left < size or length == 4 or not size


def test_the_paper_s_benefit_rewards_falling_acceptance() -> None:
    """Probes are accepted for ever, others hardly beyond the first token: the paper's formula feeds the others."""
    stats = FixedStats([0.9, 0.9, 0.9, 0.9], [0.5, 0.1, 0.1, 0.1], alpha=0.5)
    paper = PaperBudget(times=LinearTimes(), stats=stats, priority_factor=1.0)
    gain = PaperBudget(times=LinearTimes(), stats=stats, priority_factor=1.0, benefit="expected_gain")
    assert paper.split(2, 1, 1) == (1, 3)
    assert gain.split(2, 1, 1) == (4, 0)


def test_lengths_are_those_of_the_class_cut_to_what_was_drafted() -> None:
    policy = PaperBudget(times=LinearTimes(), stats=ALPHA_BETA)
    batch = make_batch([[0.9] * 6, [0.9] * 2, [], [0.9] * 6])
    assert allocate(policy, probes(1, 1, 0, 0), batch) == [4, 2, 0, 4]
    short = PaperBudget(times=LinearTimes(), stats=ALPHA_BETA, gamma_max=3)
    assert allocate(short, probes(1, 1, 0, 0), batch) == [3, 2, 0, 3]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"speculation\.priority_factor"):
        ExpectedGainBudget(times=LinearTimes(), priority_factor=0.5)
    with pytest.raises(ConfigError, match=r"PaperBudget\.gamma_max"):
        PaperBudget(times=LinearTimes(), stats=ALPHA_BETA, gamma_max=0)
