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
        generated: float64 [n]; tokens generated so far.
        is_probe: bool [n]; the high class of Algorithm 1.
        num_seqs: Requests as the step time counts them: those of the fullest rank, times the ranks.
        mean_context: Mean tokens of them.
    """

    groups: np.ndarray
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
        num_tree_plans: How often trees were chosen.
    """

    def __init__(
        self, spec: SpeculationSpec, times: StepTimeModel, progress: np.ndarray, *, trees: bool = False
    ) -> None:
        """Prepare the acceptance table.

        Args:
            spec: Acceptance by number of references, and the bounds of drafts.
            times: T(B, gamma) of the instances.
            progress: See above; shared, not copied.
            trees: Whether drafts branch where that emits more tokens a second; all requests of a step then, for a
                batch is small or it is not.
        """
        self.progress = progress
        self._alphas = np.array([spec.acceptance_probability(n) for n in range(spec.acceptance_references[-1] + 1)])
        self._numbers = np.arange(len(self._alphas))
        self._moments = emitted_moments(self._alphas, spec.gamma_max)
        self._tree_lengths = np.array([spec.tree_acceptance_length(int(n)) for n in self._numbers])
        self._tree_nodes, self._trees = spec.tree_nodes, trees
        self.num_tree_plans = 0
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

    def references(self, batch: DraftingBatch) -> np.ndarray:
        """Siblings that each request can draft from: float64 [n].

        A sibling that is as far as the request, or finished beyond it, is a whole one; one that is half as far counts
        half, since where a request is now, siblings that are behind have nothing to say yet.
        """
        own = np.maximum(batch.generated, 1.0)
        shares = np.minimum(self.progress[batch.groups], own[:, None]).sum(axis=1) / own
        return np.clip(shares - np.minimum(batch.generated, 1.0), 0.0, len(self._alphas) - 1)

    def plan(self, batch: DraftingBatch) -> Verification | None:
        """See `SpeculationModel`."""
        references, is_probe = self.references(batch), batch.is_probe
        alphas = np.interp(references, self._numbers, self._alphas)
        self._stats.mean = float(alphas.sum()) / len(alphas)
        num_probes = int(is_probe.sum())
        num_others = len(alphas) - num_probes
        self._stats.by_class = (
            float(alphas[~is_probe].mean()) if num_others else self._stats.mean,
            float(alphas[is_probe].mean()) if num_probes else self._stats.mean,
        )
        room = batch.num_seqs * (1 + self._gamma_max)
        gamma = self._budget.best_gamma(batch.num_seqs, batch.mean_context, room)
        lines = self._lines(references, is_probe, gamma, batch) if gamma else None
        return self._branched(references, lines, batch) if self._trees else lines

    def _lines(self, references: np.ndarray, is_probe: np.ndarray, gamma: int, batch: DraftingBatch) -> Verification:
        """Draft lengths by class."""
        num_probes = int(is_probe.sum())
        num_others = len(is_probe) - num_probes
        gamma_probe, gamma_other = self._budget.split(gamma, num_probes, num_others)
        rates, variances = (np.interp(references, self._numbers, table[gamma_other]) for table in self._moments)
        if num_probes:
            of_probes = (np.interp(references, self._numbers, table[gamma_probe]) for table in self._moments)
            rates, variances = (np.where(is_probe, *pair) for pair in zip(of_probes, (rates, variances), strict=True))
        num_tokens = len(is_probe) + num_probes * gamma_probe + num_others * gamma_other
        return Verification(rates, variances, round(batch.num_seqs / len(is_probe) * num_tokens))

    def _branched(
        self, references: np.ndarray, lines: Verification | None, batch: DraftingBatch
    ) -> Verification | None:
        """A tree for every request if that emits more tokens a second than lines, or than no drafts."""
        rates = np.interp(references, self._numbers, self._tree_lengths)
        num_tokens = round(batch.num_seqs * (1 + self._tree_nodes))
        tree_s = self.step_s(batch.num_seqs, num_tokens, batch.mean_context)
        if lines is None:
            other = len(rates) / self._times.plain_step_s(batch.num_seqs, batch.mean_context)
        else:
            other = lines.rates.sum() / self.step_s(batch.num_seqs, lines.num_tokens, batch.mean_context)
        if rates.sum() / tree_s <= other:
            return lines
        self.num_tree_plans += 1
        variances = np.interp(references, self._numbers, self._moments[1][self._gamma_max])
        return Verification(rates, variances, num_tokens)

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
        variance = emitted_moments(np.array([alpha]), longest)[1][longest, 0]
        return Verification(
            np.full(shape, self.spec.acceptance_length),
            np.full(shape, variance),
            round(batch.num_seqs * (1 + self.spec.mean_drafted)),
        )

    def step_s(self, num_seqs: int, num_tokens: int, mean_context: float) -> float:
        """See `SpeculationModel`; the tokens verified follow from the requests."""
        return float(self.spec.step_s(self.times, num_seqs, mean_context))


def emitted_moments(alphas: np.ndarray, gamma_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the tokens that one verification emits: float64 [gamma_max + 1, n] each.

    It emits 1 + X tokens, X the leading successes among gamma trials: E X is the sum of alpha**k over k = 1 .. gamma,
    E X^2 that of (2 k - 1) alpha**k.

    Args:
        alphas: float64 [n]; probability of each trial.
        gamma_max: Trials at most.
    """
    depths = np.arange(1, gamma_max + 1)[:, None]
    powers = alphas**depths
    none = np.zeros((1, len(alphas)))
    means = np.concatenate((none, powers.cumsum(axis=0)))
    squares = np.concatenate((none, ((2 * depths - 1) * powers).cumsum(axis=0)))
    return 1 + means, np.maximum(squares - means**2, 0.0)
