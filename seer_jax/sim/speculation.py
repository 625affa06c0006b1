"""What speculative decoding brings: tokens per step, by what there is to draft from, and what the baseline's costs."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.sim.roofline import RooflineStepTimes

VanillaKind = Literal["suffix", "draft_model", "mtp"]
BISECTIONS = 60
"""Halvings of 0 .. 1; a float64 has 53 bits."""


@dataclass(frozen=True, kw_only=True)
class VanillaSpec:
    """Speculative decoding of the baseline: every request the same draft length, nothing from the group.

    Attributes:
        kind: `suffix`: from the request's own text; `draft_model`: by a small model; `mtp`: by an extra layer.
        gamma: Longest draft.
        acceptance_length: tau, mean tokens that a verification emits.
        mean_drafted: Mean tokens drafted per request and step; `gamma`, or fewer where nothing is found.
        passes: Passes of the draft model or layer one after another per step; 0 for `suffix`.
        parameters: Of the draft model that a pass multiplies with; it is split over chips as the model's dense part is.
        layer_share: Share of the model's layers that an MTP pass runs.
        kv_bytes_per_token: KV cache of what drafts, beside the model's in the same memory.
        pass_overhead_s: Fixed seconds of a pass.
    """

    kind: VanillaKind
    gamma: int
    acceptance_length: float
    mean_drafted: float
    passes: int
    parameters: float
    layer_share: float
    kv_bytes_per_token: float
    pass_overhead_s: float

    def __post_init__(self) -> None:
        if self.acceptance_length > 1 + self.mean_drafted:
            problem = f"is {self.acceptance_length}, {self.mean_drafted} tokens are drafted"
            raise ConfigError("speculation.vanilla_acceptance_length", problem, "at most one more than is drafted")

    def step_s(self, times: RooflineStepTimes, num_seqs: int, mean_context: float) -> float:
        """One step of `num_seqs` requests, drafting included; it emits `acceptance_length` tokens of each on average.

        Drafting from the text costs what it costs Seer. A draft model costs its passes.
        """
        num_tokens = num_seqs + round(num_seqs * self.mean_drafted)
        if self.kind == "suffix":
            return times.verify_step_s(num_seqs, num_tokens, mean_context)
        if self.kind == "mtp":
            pass_s = self.layer_share * (times.plain_step_s(num_seqs, mean_context) - times.step_overhead_s)
        else:
            kv_bytes = self.kv_bytes_per_token * num_seqs * mean_context
            pass_s = times.pass_s(num_seqs, self.parameters, kv_bytes)
        passes_s = self.passes * (self.pass_overhead_s + pass_s)
        return times.forward_s(num_seqs, num_tokens, mean_context) + passes_s


@dataclass(frozen=True, kw_only=True)
class SpeculationSpec:
    """Acceptance of drafts from the group.

    Attributes:
        acceptance_references: Numbers of finished or running siblings to draft from, ascending from 0.
        acceptance_lengths: tau for each with drafts of `gamma_max` tokens, one path, bonus token included.
        tree_acceptance_lengths: tau for each with trees of `tree_nodes` nodes.
        tree_nodes: Nodes of a tree, in the mean.
        acceptance_scale: Factor on tau - 1: how much easier or harder this model is to draft for.
        gamma_max: Longest draft.
        priority_factor: lambda of Algorithm 1.
        vanilla: The baseline's speculative decoding.
    """

    acceptance_references: tuple[int, ...]
    acceptance_lengths: tuple[float, ...]
    tree_acceptance_lengths: tuple[float, ...]
    tree_nodes: float
    acceptance_scale: float
    gamma_max: int
    priority_factor: float
    vanilla: VanillaSpec

    def __post_init__(self) -> None:
        references, path = self.acceptance_references, "speculation.acceptance_references"
        if references[0] != 0 or any(a >= b for a, b in pairwise(references)):
            raise ConfigError(path, f"is {list(references)}", "ascending from 0")
        for name in ("acceptance_lengths", "tree_acceptance_lengths"):
            if len(references) != len(getattr(self, name)):
                problem = f"has {len(references)} entries, {name} {len(getattr(self, name))}"
                raise ConfigError(path, problem, "one length per number of references")
        longest = 1 + self.acceptance_scale * (max(self.acceptance_lengths) - 1)
        if longest >= 1 + self.gamma_max:
            problem = f"gives up to {longest:g} tokens a step, {1 + self.gamma_max} are verified"
            raise ConfigError("speculation.acceptance_scale", problem, "a smaller factor, or longer drafts")

    def acceptance_length(self, num_references: int) -> float:
        """tau with so many siblings to draft from: linear between the known numbers, level after the last."""
        return self._lengths[min(num_references, len(self._lengths) - 1)]

    def acceptance_probability(self, num_references: int) -> float:
        """beta, the same for all positions, that gives that tau: 1 + beta + ... + beta**gamma_max."""
        return self._probabilities[min(num_references, len(self._probabilities) - 1)]

    def tree_acceptance_length(self, num_references: int) -> float:
        """tau of trees with so many siblings to draft from."""
        taus = np.interp(num_references, self.acceptance_references, self.tree_acceptance_lengths)
        return float(1 + self.acceptance_scale * (taus - 1))

    @cached_property
    def _lengths(self) -> tuple[float, ...]:
        numbers = np.arange(self.acceptance_references[-1] + 1)
        taus = np.interp(numbers, self.acceptance_references, self.acceptance_lengths)
        return tuple((1 + self.acceptance_scale * (taus - 1)).tolist())

    @cached_property
    def _probabilities(self) -> tuple[float, ...]:
        return tuple(probability_of(tau, self.gamma_max) for tau in self._lengths)


def probability_of(tau: float, gamma: int) -> float:
    """The acceptance of every position with which drafts of `gamma` tokens emit `tau` tokens a step: in [0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(middle**position for position in range(gamma + 1)) < tau:
            low = middle
        else:
            high = middle
    return (low + high) / 2
