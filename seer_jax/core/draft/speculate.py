"""Draft tokens from a group's automaton: the likeliest continuations of a request's own last tokens.

A draft is a tree, grown best first: of all continuations known so far the one with the highest path probability becomes
the next node, until the node budget is spent or what is left is too unlikely. With `top_k = 1` it is a line. So the
first n nodes of a draft are its n likeliest, and a tree themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seer_jax.core.draft import kernels
from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.errors import ConfigError

MAX_TOP_K = 8
UNCALIBRATED = np.ones(kernels.NUM_BINS, np.float32)
"""Takes the counts at their word."""


@dataclass(frozen=True, kw_only=True)
class SpeculationArgs:
    """How a draft is made (the paper's SpeculationArgs, and the cuts of SuffixDecoding).

    Attributes:
        max_spec_tokens: Deepest node.
        pattern_lookup_max: Longest context looked up; an automaton's `max_context` bounds it too.
        pattern_lookup_min: A request whose last tokens match less than this drafts nothing.
        top_k: Children of a node at most.
        min_probability: A node whose path is less likely is left out.
        max_depth_per_match: Deepest node per token of the matched context.
    """

    max_spec_tokens: int = 8
    pattern_lookup_max: int = 16
    pattern_lookup_min: int = 1
    top_k: int = 1
    min_probability: float = 0.0
    max_depth_per_match: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ConfigError("SpeculationArgs.top_k", f"is {self.top_k}", f"1 to {MAX_TOP_K}")
        if not 1 <= self.pattern_lookup_min <= self.pattern_lookup_max:
            raise ConfigError(
                "SpeculationArgs.pattern_lookup_min",
                f"is {self.pattern_lookup_min}",
                f"1 to pattern_lookup_max, {self.pattern_lookup_max}",
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class DraftBatch:
    """Drafts of R requests with room for W nodes each; arrays belong to the caller and are overwritten by every call.

    Attributes:
        token_ids: int32 [R, W].
        parents: int32 [R, W]; -1 is the request's newest token, and a parent comes before its children.
        scores: float32 [R, W]; path probability, calibrated; never rises along a row.
        conditionals: float32 [R, W]; probability given the parent, as counted.
        bins: int32 [R, W]; what the conditional is calibrated by, the length of its context (`kernels.bin_of`).
        num_nodes: int32 [R].
        match_length: int32 [R]; tokens of the context that was found.
    """

    token_ids: np.ndarray
    parents: np.ndarray
    scores: np.ndarray
    conditionals: np.ndarray
    bins: np.ndarray
    num_nodes: np.ndarray
    match_length: np.ndarray

    @classmethod
    def empty(cls, num_requests: int, max_nodes: int) -> "DraftBatch":
        """Allocate."""
        shape = (num_requests, max_nodes)
        return cls(
            token_ids=np.zeros(shape, np.int32),
            parents=np.zeros(shape, np.int32),
            scores=np.zeros(shape, np.float32),
            conditionals=np.zeros(shape, np.float32),
            bins=np.zeros(shape, np.int32),
            num_nodes=np.zeros(num_requests, np.int32),
            match_length=np.zeros(num_requests, np.int32),
        )


ADDRESS_FIELDS = 4
"""Where a request's structure lies: addresses of states, edges and cursor; then the longest context that is counted."""


def address_of(automaton: SuffixAutomaton, request: int) -> tuple[int, ...]:
    """Row of the `places` of `batch_speculate`; holds until the automaton is appended to, which may move its arrays."""
    cursor = automaton.cursors[automaton.cursor_of(request)]
    return (*(array.ctypes.data for array in (automaton.states, automaton.edges, cursor)), automaton.max_context)


def batch_speculate(
    places: np.ndarray,
    budgets: np.ndarray,
    args: SpeculationArgs,
    out: DraftBatch,
    calibration: np.ndarray | None = None,
) -> None:
    """Draft for many requests, of any groups, in one call.

    Args:
        places: int64 [R, ADDRESS_FIELDS], rows of `address_of`.
        budgets: int32 [R]; nodes that each request may draft, at most the width of `out`.
        args: Settings.
        out: Takes the drafts.
        calibration: float32 [NUM_BINS]; factors on what the counts say of a node given its parent, by the
            length of their context (`AcceptanceStats.calibration`). None = `UNCALIBRATED`.
    """
    kernels.draft_batch(
        places,
        np.minimum(budgets, out.token_ids.shape[1]),
        args.max_spec_tokens,
        args.pattern_lookup_max,
        args.pattern_lookup_min,
        args.top_k,
        args.min_probability,
        args.max_depth_per_match,
        UNCALIBRATED if calibration is None else calibration,
        out.token_ids,
        out.parents,
        out.scores,
        out.conditionals,
        out.bins,
        out.num_nodes,
        out.match_length,
    )


def speculate(
    automaton: SuffixAutomaton,
    requests: Sequence[int],
    budget: int,
    args: SpeculationArgs,
    calibration: np.ndarray | None = None,
) -> DraftBatch:
    """Draft for requests of one group."""
    places = np.array([address_of(automaton, request) for request in requests], np.int64)
    out = DraftBatch.empty(len(requests), budget)
    batch_speculate(places, np.full(len(requests), budget, np.int32), args, out, calibration)
    return out
