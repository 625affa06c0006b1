"""Replays recorded responses through the drafter: how many tokens a step would have emitted.

The recorded token is what the model says, whatever was drafted, so acceptance is exact for exact verification.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.kernels import SUFFIX, SUFFIX_LENGTH, append, draft, follow, rank_edges
from seer_jax.core.draft.speculate import UNCALIBRATED, SpeculationArgs


@dataclass(kw_only=True)
class Acceptance:
    """Sums over replayed responses.

    Attributes:
        num_tokens: Tokens emitted.
        num_steps: Verification steps that it took.
        num_drafted: Draft nodes verified.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0

    @property
    def mean_length(self) -> float:
        """Mean acceptance length: tokens emitted per step, the bonus token included."""
        return self.num_tokens / self.num_steps

    @property
    def drafted_per_step(self) -> float:
        """Draft nodes per step."""
        return self.num_drafted / self.num_steps

    def add(self, num_tokens: int, steps_and_drafted: tuple[int, int]) -> None:
        """Add a replay."""
        self.num_tokens += num_tokens
        self.num_steps += steps_and_drafted[0]
        self.num_drafted += steps_and_drafted[1]


def replay_with_references(
    prompt: np.ndarray,
    references: Sequence[np.ndarray],
    target: np.ndarray,
    budget: int,
    args: SpeculationArgs,
    *,
    fixed_beam: bool = False,
) -> tuple[int, int]:
    """Decode `target` while complete references of its group are known.

    Args:
        prompt: int32 [tokens].
        references: Complete responses of the group.
        target: The response to decode.
        budget: Draft nodes per step at most.
        args: Settings of the draft.
        fixed_beam: Draft with a beam of `args.top_k` paths down to `args.max_spec_tokens` instead of best first.

    Returns:
        Steps and drafted nodes.
    """
    automaton = _open_group(prompt, len(references) + 1, sum(map(len, references)) + len(target))
    for request, reference in enumerate(references, start=2):
        automaton.append(request, reference)
    return _replay(automaton, [1], [target], budget, args, fixed_beam)


def replay_in_lockstep(
    prompt: np.ndarray, responses: Sequence[np.ndarray], budget: int, args: SpeculationArgs
) -> tuple[int, int]:
    """Decode all responses of a group at once, each seeing what the others have so far; steps and drafted nodes."""
    automaton = _open_group(prompt, len(responses), sum(map(len, responses)))
    return _replay(automaton, range(1, len(responses) + 1), responses, budget, args)


def _open_group(prompt: np.ndarray, num_requests: int, num_tokens: int) -> SuffixAutomaton:
    automaton = SuffixAutomaton(capacity=len(prompt) + num_tokens)
    automaton.open(0)
    automaton.append(0, prompt)
    for request in range(1, num_requests + 1):
        automaton.open(request, like=0)
    return automaton


def _replay(
    automaton: SuffixAutomaton,
    requests: Sequence[int],
    targets: Sequence[np.ndarray],
    budget: int,
    args: SpeculationArgs,
    fixed_beam: bool = False,
) -> tuple[int, int]:
    ends = np.cumsum([len(target) for target in targets])
    return _replay_tokens(
        automaton.states,
        automaton.edges,
        automaton.buckets,
        automaton.heap,
        automaton.cursors,
        np.array([automaton.cursor_of(request) for request in requests]),
        np.concatenate(targets),
        np.concatenate([[0], ends]),
        automaton.max_context,
        budget,
        args.max_spec_tokens,
        min(args.pattern_lookup_max, automaton.max_context),
        args.pattern_lookup_min,
        args.top_k,
        args.min_probability,
        args.max_depth_per_match,
        UNCALIBRATED,
        fixed_beam,
    )


def _draft_beam(states, edges, cursor, budget, max_depth, max_context, min_context, width, token_ids, parents):
    """The fixed beam that best-first drafts are compared with: at every depth the `width` likeliest paths go on."""
    state, length = follow(states, cursor[SUFFIX], cursor[SUFFIX_LENGTH], max_context - 1)
    counts, ranked = np.empty(width, np.int64), np.empty((width, 2), np.int32)
    beam = np.empty((width, 3), np.int32)  # node, state, length of its context
    new_beam = np.empty((width, 4), np.int32)  # parent, token, state, length of its context
    scores, new_scores = np.empty(width), np.empty(width)
    beam[0, 0], beam[0, 1], beam[0, 2], scores[0] = -1, state, length, 1.0
    num_paths, num_nodes = 1, 0
    for _ in range(max_depth):
        num_new = 0
        for path in range(num_paths):
            if beam[path, 2] < min_context:
                continue
            num_ranked, total = rank_edges(states, edges, beam[path, 1], width, counts, ranked)
            for k in range(num_ranked):
                score = scores[path] * counts[k] / total
                if num_new == width and score <= new_scores[width - 1]:
                    continue
                num_new = min(num_new + 1, width)
                place = num_new - 1
                while place > 0 and new_scores[place - 1] < score:
                    new_scores[place], new_beam[place] = new_scores[place - 1], new_beam[place - 1]
                    place -= 1
                new_scores[place] = score
                new_beam[place, 0], new_beam[place, 1], new_beam[place, 2] = beam[path, 0], ranked[k, 0], ranked[k, 1]
                new_beam[place, 3] = beam[path, 2] + 1
        num_paths = min(num_new, budget - num_nodes)
        for path in range(num_paths):
            parents[num_nodes], token_ids[num_nodes] = new_beam[path, 0], new_beam[path, 1]
            state, length = follow(states, new_beam[path, 2], new_beam[path, 3], max_context - 1)
            beam[path, 0], beam[path, 1], beam[path, 2] = num_nodes, state, length
            scores[path] = new_scores[path]
            num_nodes += 1
        if num_paths == 0:
            break
    return num_nodes


def _replay_tokens(
    states,
    edges,
    buckets,
    heap,
    cursors,
    rows,
    token_ids,
    bounds,
    max_context,
    budget,
    max_depth,
    lookup_max,
    lookup_min,
    top_k,
    min_probability,
    max_depth_per_match,
    calibration,
    fixed_beam,
):
    """Step all responses in turn until all are complete; the automaton has room for them."""
    draft_ids, parents = np.empty(budget, np.int32), np.empty(budget, np.int32)
    scores, conditionals, bins = np.empty(budget, np.float32), np.empty(budget, np.float32), np.empty(budget, np.int32)
    places = bounds[:-1].copy()
    num_steps, num_drafted, num_open = 0, 0, len(rows)
    while num_open:
        num_open = 0
        for r in range(len(rows)):
            place, end = places[r], bounds[r + 1]
            if place == end:
                continue
            room = min(budget, end - place - 1)  # As in the engine, nothing is drafted past the end.
            cursor = cursors[rows[r]]
            if fixed_beam:
                num_nodes = _draft_beam(
                    states, edges, cursor, room, max_depth, lookup_max, lookup_min, top_k, draft_ids, parents
                )
            else:
                num_nodes, _ = draft(
                    states,
                    edges,
                    cursor,
                    room,
                    max_depth,
                    lookup_max,
                    lookup_min,
                    top_k,
                    min_probability,
                    max_depth_per_match,
                    calibration,
                    draft_ids,
                    parents,
                    scores,
                    conditionals,
                    bins,
                )
            num_steps += 1
            num_drafted += num_nodes
            last, node = -1, 0
            while node < num_nodes and place < end - 1:
                if parents[node] == last and draft_ids[node] == token_ids[place]:
                    last = node
                    place += 1
                node += 1
            place += 1
            new = token_ids[places[r] : place]
            append(states, edges, buckets, heap, cursor, new, max_context)
            places[r] = place
            num_open += place < end
    return num_steps, num_drafted


# Not kept between runs: see `kernels.compiled`.
_draft_beam = numba.njit(inspect.unwrap(_draft_beam))
_replay_tokens = numba.njit(inspect.unwrap(_replay_tokens))
