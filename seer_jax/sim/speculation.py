"""Speculative decoding as a model: how fast requests emit, and what a verification costs.

Adaptive grouped speculation runs Algorithm 1 itself (`core.draft.budget.PaperBudget`) over modelled acceptance; the
vanilla kinds draft a fixed length, whatever the batch. Acceptance of grouped drafts grows with the siblings' tokens
that a request could draft from (Seer, Table 2).
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from seer_jax.core.draft.acceptance import AcceptanceStats
from seer_jax.core.draft.budget import PaperBudget
from seer_jax.core.latency import StepTimeModel
from seer_jax.sim.workloads import SpeculationSpec


class Verification(NamedTuple):
    """What speculation does to the steps of one instance until its batch changes.

    Attributes:
        rates: float64 [n]; tokens that each request emits a step, in the mean.
        variances: float64 [n]; of the tokens of one step.
        num_tokens: Tokens that a step verifies, the newest one of each request included.
        extra_s: Seconds a step on top, for a drafter on the accelerator.
    """

    rates: np.ndarray
    variances: np.ndarray
    num_tokens: float
    extra_s: float


class DraftingBatch(NamedTuple):
    """The running requests of an instance.

    Attributes:
        groups: int [n]; positions of their groups.
        indices: int [n]; which of the group's requests.
        generated: float64 [n]; tokens generated so far.
        is_probe: bool [n]; the high class of Algorithm 1.
        num_seqs: Requests as the step time counts them: those of the fullest rank, times the ranks.
        mean_context: Mean tokens of them.
    """

    groups: np.ndarray
    indices: np.ndarray
    generated: np.ndarray
    is_probe: np.ndarray
    num_seqs: int
    mean_context: float


@runtime_checkable
class SpeculationModel(Protocol):
    """What an instance asks when its batch has changed."""

    def plan(self, batch: DraftingBatch) -> Verification | None:
        """Choose drafts for a batch; None: decode plainly."""
        ...


class ModelledAcceptance(AcceptanceStats):
    """Acceptance statistics of an instance whose drafts are accepted with one probability at every position."""

    def __init__(self, max_depth: int) -> None:
        super().__init__(max_depth)
        self.by_class = (0.5, 0.5)
        self.mean = 0.5

    @property
    def alpha(self) -> float:
        """See `AcceptanceStats`."""
        return self.mean

    def beta(self, is_probe: bool) -> np.ndarray:
        """See `AcceptanceStats`."""
        return np.full(self.max_depth, self.by_class[int(is_probe)])


class GroupedSpeculation:
    """Seer's: drafts from the whole group, lengths by Algorithm 1.

    Attributes:
        progress: float64 [groups, size]; tokens that every request of the iteration has generated; the instances write
            it, as their clients tell the draft server.
    """

    def __init__(self, spec: SpeculationSpec, times: StepTimeModel, progress: np.ndarray) -> None:
        """Prepare the acceptance table.

        Args:
            spec: Acceptance by number of references, and the bounds of drafts.
            times: T(B, gamma) of the instances.
            progress: See above; shared, not copied.
        """
        self.progress = progress
        self._references = np.log2(1 + np.asarray(spec.acceptance_references, np.float64))
        lengths = [1 + spec.acceptance_scale * (length - 1) for length in spec.acceptance_lengths]
        self._alphas = np.array([acceptance_of(length, spec.gamma_max) for length in lengths])
        self._gamma_max = spec.gamma_max
        self._stats = ModelledAcceptance(spec.gamma_max)
        self._budget = PaperBudget(
            times=times,
            stats=self._stats,
            gamma_max=spec.gamma_max,
            priority_factor=spec.priority_factor,
            benefit="expected_gain",
        )

    def acceptance(self, batch: DraftingBatch) -> np.ndarray:
        """Probability that a draft token is right, by what the group has said: float64 [n].

        A sibling that is as far as the request, or finished beyond it, is a whole reference; one that is half as far
        helps half as often, since where a request is now, siblings that are behind have nothing to say yet.
        """
        siblings = self.progress[batch.groups]
        own = np.maximum(batch.generated, 1.0)[:, None]
        references = np.maximum(np.minimum(siblings / own, 1.0).sum(axis=1) - np.minimum(batch.generated, 1.0), 0.0)
        return np.interp(np.log2(1 + references), self._references, self._alphas)

    def plan(self, batch: DraftingBatch) -> Verification | None:
        """See `SpeculationModel`."""
        alphas = self.acceptance(batch)
        self._stats.mean = float(alphas.mean())
        num_probes = int(batch.is_probe.sum())
        num_others = len(alphas) - num_probes
        self._stats.by_class = (
            float(alphas[~batch.is_probe].mean()) if num_others else self._stats.mean,
            float(alphas[batch.is_probe].mean()) if num_probes else self._stats.mean,
        )
        room = batch.num_seqs * (1 + self._gamma_max)
        gamma = self._budget.best_gamma(batch.num_seqs, batch.mean_context, room)
        if not gamma:
            return None
        gamma_probe, gamma_other = self._budget.split(gamma, num_probes, num_others)
        gammas = np.where(batch.is_probe, gamma_probe, gamma_other)
        rates = (1 - alphas ** (gammas + 1)) / (1 - alphas)
        fill = batch.num_seqs / len(alphas)
        return Verification(rates, _variances(alphas, gammas), float(fill * (1 + gammas).sum()), 0.0)


@dataclass(frozen=True)
class VanillaSpeculation:
    """Drafts of a fixed length that know nothing of the group: own history, a draft model, or MTP heads.

    Attributes:
        acceptance_length: Mean tokens of a verification, the bonus token included.
        num_drafted: Draft tokens that a request has verified a step, in the mean.
        extra_s: Seconds of drafting on the accelerator for a batch of so many requests.
    """

    acceptance_length: float
    num_drafted: float
    extra_s: float = 0.0

    def plan(self, batch: DraftingBatch) -> Verification | None:
        """See `SpeculationModel`."""
        shape = len(batch.generated)
        alpha = acceptance_of(self.acceptance_length, max(1, math.ceil(self.num_drafted)))
        return Verification(
            np.full(shape, self.acceptance_length),
            _variances(np.full(shape, alpha), np.full(shape, math.ceil(self.num_drafted))),
            batch.num_seqs * (1 + self.num_drafted),
            self.extra_s,
        )


@functools.lru_cache(maxsize=1024)
def acceptance_of(length: float, gamma: int) -> float:
    """The acceptance probability at which drafts of `gamma` tokens emit `length` tokens a step, in [0, 0.999]."""
    low, high = 0.0, 0.999
    for _ in range(60):
        middle = (low + high) / 2
        emitted = (1 - middle ** (gamma + 1)) / (1 - middle)
        low, high = (middle, high) if emitted < length else (low, middle)
    return (low + high) / 2


def _variances(alphas: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Variance of the tokens of a step: 1 + the number of leading successes among gamma trials."""
    powers = alphas[:, None] ** np.arange(1, 1 + max(1, int(gammas.max(initial=0))))
    powers *= np.arange(powers.shape[1]) < gammas[:, None]
    mean = powers.sum(axis=1)
    second = (powers * (2 * np.arange(1, powers.shape[1] + 1) - 1)).sum(axis=1)
    return np.maximum(second - mean**2, 0.0)
