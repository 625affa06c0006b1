"""Speculative decoding as a model: how fast requests emit, and what a verification costs.

Adaptive grouped speculation runs Algorithm 1 itself (`core.draft.budget.PaperBudget`) over modelled acceptance; the
vanilla kinds draft a fixed length, whatever the batch. Acceptance of grouped drafts grows with the siblings' tokens
that a request could draft from (Seer, Table 2).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from seer_jax.core.draft.acceptance import AcceptanceStats
from seer_jax.core.draft.budget import PaperBudget
from seer_jax.core.latency import StepTimeModel
from seer_jax.sim.roofline import RooflineStepTimes
from seer_jax.sim.speculation import SpeculationSpec, VanillaSpec, probability_of


class Verification(NamedTuple):
    """What speculation does to the steps of one instance until its batch changes.

    Attributes:
        rates: float64 [n]; tokens that each request emits a step, in the mean.
        variances: float64 [n]; of the tokens of one step.
        num_tokens: Tokens that a step verifies, the newest one of each request included.
    """

    rates: np.ndarray
    variances: np.ndarray
    num_tokens: int


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

    def step_s(self, num_seqs: int, num_tokens: int, mean_context: float) -> float:
        """Seconds of a step that verifies so many tokens, drafting included."""
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
        self._alphas = np.array([spec.acceptance_probability(n) for n in range(spec.acceptance_references[-1] + 1)])
        self._times = times
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
        return np.interp(references, np.arange(len(self._alphas)), self._alphas)

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
        num_tokens = round(batch.num_seqs / len(alphas) * float((1 + gammas).sum()))
        return Verification(rates, _variances(alphas, gammas), num_tokens)

    def step_s(self, num_seqs: int, num_tokens: int, mean_context: float) -> float:
        """See `SpeculationModel`."""
        return float(self._times.verify_step_s(num_seqs, num_tokens, mean_context))


@dataclass(frozen=True)
class VanillaSpeculation:
    """The baseline's: drafts of a fixed length that know nothing of the group.

    Attributes:
        spec: Own history, a draft model or MTP layers; tau and cost.
        times: Of the model.
    """

    spec: VanillaSpec
    times: RooflineStepTimes

    def plan(self, batch: DraftingBatch) -> Verification | None:
        """See `SpeculationModel`."""
        shape = len(batch.generated)
        longest = max(1, math.ceil(self.spec.mean_drafted))
        alpha = probability_of(self.spec.acceptance_length, longest)
        return Verification(
            np.full(shape, self.spec.acceptance_length),
            _variances(np.full(shape, alpha), np.full(shape, longest)),
            round(batch.num_seqs * (1 + self.spec.mean_drafted)),
        )

    def step_s(self, num_seqs: int, num_tokens: int, mean_context: float) -> float:
        """See `SpeculationModel`; the tokens verified follow from the requests."""
        return float(self.spec.step_s(self.times, num_seqs, mean_context))


def _variances(alphas: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Variance of the tokens of a step: 1 + the number of leading successes among gamma trials."""
    powers = alphas[:, None] ** np.arange(1, 1 + max(1, int(gammas.max(initial=0))))
    powers *= np.arange(powers.shape[1]) < gammas[:, None]
    mean = powers.sum(axis=1)
    second = (powers * (2 * np.arange(1, powers.shape[1] + 1) - 1)).sum(axis=1)
    return np.maximum(second - mean**2, 0.0)
