"""How many draft tokens to verify: nothing is gained by a token that costs more time than it saves.

All policies look at drafts that exist already and keep the first nodes of each: the time that drafting took is spent
either way and is no part of the choice. Source: Seer, Algorithm 1 (marginal-benefit-aware).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from seer_jax.core.draft.acceptance import AcceptanceStats
from seer_jax.core.draft.speculate import DraftBatch
from seer_jax.core.errors import ConfigError
from seer_jax.core.latency import StepTimeModel


@runtime_checkable
class DraftBudgetPolicy(Protocol):
    """Chooses how much of the drafts of one step is verified."""

    def allocate(self, is_probe: np.ndarray, batch: DraftBatch, mean_context: float, room_tokens: int) -> np.ndarray:
        """Choose the nodes to verify.

        Args:
            is_probe: bool [B], B at least 1; Seer's high priority class.
            batch: Drafts of the B requests.
            mean_context: Mean tokens of the requests.
            room_tokens: Tokens that one verification holds at most, the newest one of each request included.

        Returns:
            int32 [B]; so many of the first nodes of each row. All zero: decode plainly, do not verify.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FixedBudget:
    """Verifies whatever was drafted; if there is no room for all of it, the likeliest nodes.

    Attributes:
        tile: Tokens of a request that attend together; a step computes whole tiles.
    """

    tile: int = 1

    def allocate(self, is_probe: np.ndarray, batch: DraftBatch, mean_context: float, room_tokens: int) -> np.ndarray:
        """See `DraftBudgetPolicy`."""
        num_requests = len(is_probe)
        if _whole_tiles(1 + batch.num_nodes[:num_requests], self.tile).sum() <= room_tokens:
            return batch.num_nodes[:num_requests].copy()
        rows, columns, _ = _nodes_best_first(batch, np.ones(num_requests, np.float32))
        most = np.searchsorted(_count_tokens(columns, num_requests, self.tile), room_tokens, side="right")
        return _count_rows(rows[:most], num_requests)


@dataclass(frozen=True, kw_only=True)
class ExpectedGainBudget:
    """Verifies the likeliest nodes of all requests, as many as emit the most tokens per second.

    Algorithm 1 with its terms made exact: a node's score is the probability that it is emitted, so N nodes of B
    requests emit B + the sum of their scores tokens. N is the one with the best expected rate, and speculation is off
    unless that beats plain decoding. The depth then differs between requests, and one that has no draft costs nothing.

    Attributes:
        times: How long steps take.
        priority_factor: A node of a probe is taken before others that are up to so many times likelier.
        tile: Tokens of a request that attend together; a step computes whole tiles.
    """

    times: StepTimeModel
    priority_factor: float = 2.0
    tile: int = 1

    def __post_init__(self) -> None:
        _check_priority_factor(self.priority_factor)

    def allocate(self, is_probe: np.ndarray, batch: DraftBatch, mean_context: float, room_tokens: int) -> np.ndarray:
        """See `DraftBudgetPolicy`."""
        num_requests = len(is_probe)
        weights = np.where(is_probe, self.priority_factor, 1).astype(np.float32)
        rows, columns, scores = _nodes_best_first(batch, weights)
        num_tokens = _count_tokens(columns, num_requests, self.tile)
        most = np.searchsorted(num_tokens, room_tokens, side="right")
        if most < 1:
            return np.zeros(num_requests, np.int32)
        num_emitted = num_requests + np.cumsum(scores[:most], dtype=np.float64)
        rates = num_emitted / self.times.verify_step_s(num_requests, num_tokens[:most], mean_context)
        best = int(rates.argmax())
        if rates[best] <= num_requests / self.times.plain_step_s(num_requests, mean_context):
            return np.zeros(num_requests, np.int32)
        return _count_rows(rows[: best + 1], num_requests)


@dataclass(frozen=True, kw_only=True)
class PaperBudget:
    """Algorithm 1 of the paper: one draft length for the probes, one for all others.

    gamma*, the length that is best if all requests have it, gives a budget of gamma* x B tokens. It is handed out one
    position of one class at a time, by marginal benefit. The traps, and what is done about them:

    - The benefit "B x (beta[gamma] - beta[gamma + 1])" needs a beta[0], which is 1 here. It rewards *falling*
      acceptance; `benefit="expected_gain"` takes the tokens that the position gains, B x beta[1] x ... x
      beta[gamma + 1]. Neither is divided by what the position costs, B tokens.
    - The factor stands on the low class's side, so a larger one makes probes *harder* to raise. Kept.
    - gamma* = 0 disables, also without probes, where "budget smaller than B_h" would not.
    - A class without requests takes nothing, and its benefit of 0 holds nobody up.
    - The text stops when the low class can take no more, though the high one could. Here it can. What then is left is
      too little for a position of a whole class.
    - T_SD is 0 / 0 at alpha = 1; the sum of the geometric series is not.

    Attributes:
        times: T(B, gamma); D is not counted, the drafts exist.
        stats: alpha and beta.
        gamma_max: Longest draft of a class; positions that `stats` does not tell apart are left out too.
        priority_factor: lambda.
        benefit: Which marginal benefit.
        tile: Tokens of a request that attend together; a step computes whole tiles.
    """

    times: StepTimeModel
    stats: AcceptanceStats
    gamma_max: int = 8
    priority_factor: float = 2.0
    benefit: Literal["paper", "expected_gain"] = "paper"
    tile: int = 1

    def __post_init__(self) -> None:
        _check_priority_factor(self.priority_factor)
        if self.gamma_max < 1:
            raise ConfigError("PaperBudget.gamma_max", f"is {self.gamma_max}", "at least 1")

    def allocate(self, is_probe: np.ndarray, batch: DraftBatch, mean_context: float, room_tokens: int) -> np.ndarray:
        """See `DraftBudgetPolicy`."""
        num_requests, num_probes = len(is_probe), int(is_probe.sum())
        gamma = self.best_gamma(num_requests, mean_context, room_tokens)
        gamma_probe, gamma_other = self.split(gamma, num_probes, num_requests - num_probes)
        drafted = batch.num_nodes[:num_requests]
        num_nodes = np.minimum(np.where(is_probe, gamma_probe, gamma_other), drafted)
        if _whole_tiles(1 + num_nodes, self.tile).sum() > room_tokens:
            num_nodes = np.minimum(gamma, drafted)  # The split opened more tiles than there is room for.
        return num_nodes.astype(np.int32)

    def best_gamma(self, num_requests: int, mean_context: float, room_tokens: int) -> int:
        """gamma*: the one length for all requests that gives the least expected time per token; 0 = none."""
        room = room_tokens // (num_requests * self.tile) * self.tile - 1
        gammas = np.arange(1, min(self._longest, room) + 1)
        num_emitted = np.cumsum(self.stats.alpha ** np.arange(len(gammas) + 1))
        times = np.empty(len(gammas) + 1)
        times[0] = self.times.plain_step_s(num_requests, mean_context)
        num_tokens = num_requests * _whole_tiles(1 + gammas, self.tile)
        times[1:] = self.times.verify_step_s(num_requests, num_tokens, mean_context)
        return int((times / num_emitted).argmin())

    def split(self, gamma: int, num_probes: int, num_others: int) -> tuple[int, int]:
        """Draft lengths of probes and of others, from a budget of `gamma` tokens per request."""
        if gamma == 0:
            return 0, 0
        gammas = [1 if num_probes else 0, 0]
        left = gamma * (num_probes + num_others) - num_probes
        gains = [self._gains(num_probes, is_probe=True), self._gains(num_others, is_probe=False)]
        while True:
            high, low = (
                0 < size <= left and length < self._longest
                for size, length in zip((num_probes, num_others), gammas, strict=True)
            )
            if not (high or low):
                return gammas[0], gammas[1]
            if high and low:
                high = gains[0][gammas[0]] > self.priority_factor * gains[1][gammas[1]]
            gammas[0 if high else 1] += 1
            left -= num_probes if high else num_others

    @property
    def _longest(self) -> int:
        return min(self.gamma_max, self.stats.max_depth)

    def _gains(self, num_requests: int, is_probe: bool) -> list[float]:
        """Marginal benefit of going from draft length 0, 1, ... to the next."""
        beta = self.stats.beta(is_probe)
        if self.benefit == "expected_gain":
            return (num_requests * np.cumprod(beta)).tolist()
        return (num_requests * -np.diff(beta, prepend=1.0)).tolist()


def _nodes_best_first(batch: DraftBatch, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and score of the nodes of the first rows of a batch, by falling score times the weight of the row.

    Scores never rise along a row and equals keep their order, so however many are taken are a prefix of every row.
    """
    is_node = np.arange(batch.scores.shape[1]) < batch.num_nodes[: len(weights), None]
    rows, columns = is_node.nonzero()
    scores = batch.scores[: len(weights)][is_node]
    order = np.argsort(-scores * weights[rows], kind="stable")
    return rows[order], columns[order], scores[order]


def _whole_tiles(lengths: np.ndarray, tile: int) -> np.ndarray:
    """Tokens that runs of these lengths compute."""
    return tile * -(-lengths // tile)


def _count_tokens(columns: np.ndarray, num_requests: int, tile: int) -> np.ndarray:
    """Tokens that a step computes with the first 1, 2, ... of nodes in these columns: a run fills whole tiles."""
    opens_tile = (columns + 1) % tile == 0
    return tile * (num_requests + np.cumsum(opens_tile))


def _count_rows(rows: np.ndarray, num_rows: int) -> np.ndarray:
    return np.bincount(rows, minlength=num_rows).astype(np.int32)


def _check_priority_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ConfigError("speculation.priority_factor", f"is {factor}", "at least 1")
