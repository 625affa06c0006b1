"""The suffix automaton against a search through all texts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.draft import kernels
from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.reference import ReferenceIndex
from seer_jax.core.draft.speculate import SpeculationArgs, speculate
from seer_jax.core.errors import ConfigError, ProtocolError

MAX_CONTEXT = 5
# Few different tokens, so that everything repeats; deltas of several requests in any order.
appends = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=6)), max_size=14)
prompts = st.lists(st.integers(0, 2), max_size=5)


def build(prompt: list[int], deltas: list[tuple[int, list[int]]]) -> tuple[SuffixAutomaton, ReferenceIndex]:
    automaton, reference = SuffixAutomaton(MAX_CONTEXT), ReferenceIndex(MAX_CONTEXT)
    for index in (automaton, reference):
        index.open(0)
    automaton.append(0, np.array(prompt, np.int32))
    reference.append(0, prompt)
    for request in (1, 2):
        automaton.open(request, like=0)
        reference.open(request, like=0)
    for request, tokens in deltas:
        automaton.append(request, np.array(tokens, np.int32))
        reference.append(request, tokens)
    return automaton, reference


def walk(automaton: SuffixAutomaton, context: tuple[int, ...]) -> int | None:
    """State of a context; None if it does not occur."""
    state = 0
    for token in context:
        state = kernels.find(automaton.states, automaton.edges, automaton.buckets, state, token)
        if not state:
            return None
    return state


@given(prompts, appends)
def test_counts_and_continuations_are_those_of_a_search(prompt: list[int], deltas: list[tuple[int, list[int]]]) -> None:
    automaton, reference = build(prompt, deltas)
    contexts = {()}
    for length in range(1, MAX_CONTEXT + 1):
        contexts |= {reference.last_tokens(node, length) for node in range(1, automaton.num_tokens + 1)}
    for context in contexts:
        state = walk(automaton, context)
        assert state is not None
        if context:
            assert automaton.states[state, kernels.COUNT] == reference.count(context)
        if len(context) < MAX_CONTEXT:
            followers = {token: walk(automaton, (*context, token)) for token in range(3)}
            counts = {token: automaton.states[s, kernels.COUNT] for token, s in followers.items() if s is not None}
            assert counts == reference.continuations(context)
    absent = {(*context, token) for context in contexts if len(context) < MAX_CONTEXT for token in range(4)} - contexts
    assert all(walk(automaton, context) is None for context in absent)


@given(prompts, appends, st.integers(1, 3), st.sampled_from([0.5, 1.0, 8.0]))
def test_line_follows_the_likeliest_continuation_of_the_longest_match(
    prompt: list[int], deltas: list[tuple[int, list[int]]], min_context: int, max_depth_per_match: float
) -> None:
    automaton, reference = build(prompt, deltas)
    args = SpeculationArgs(max_spec_tokens=6, pattern_lookup_min=min_context, max_depth_per_match=max_depth_per_match)
    drafts = speculate(automaton, [0, 1, 2], 6, args)
    for request in range(3):
        expected = reference.draft_line(request, args)
        tokens = drafts.token_ids[request, : drafts.num_nodes[request]]
        assert len(tokens) >= len(expected)
        assert all(token in allowed for token, allowed in zip(tokens, expected, strict=False))
        if not expected or len(expected[-1]) == 1:
            assert len(tokens) == len(expected)
        assert drafts.parents[request, : len(tokens)].tolist() == list(range(-1, len(tokens) - 1))


@given(prompts, appends, st.integers(1, 4), st.integers(1, 10))
def test_tree_is_a_tree_of_known_continuations_best_first(
    prompt: list[int], deltas: list[tuple[int, list[int]]], top_k: int, budget: int
) -> None:
    automaton, _ = build(prompt, deltas)
    drafts = speculate(automaton, [1], budget, SpeculationArgs(max_spec_tokens=4, top_k=top_k))
    count = drafts.num_nodes[0]
    parents, tokens, scores = (array[0, :count] for array in (drafts.parents, drafts.token_ids, drafts.scores))
    assert all(parent < node for node, parent in enumerate(parents))
    assert len(set(zip(parents.tolist(), tokens.tolist(), strict=True))) == count
    assert np.all(np.diff(scores) <= 1e-6) and np.all((scores > 0) & (scores <= 1))
    for parent in {-1, *range(count)}:
        children = scores[parents == parent]
        assert len(children) <= top_k
        assert children.sum() <= (1 if parent < 0 else scores[parent]) + 1e-5


def test_own_end_is_no_match() -> None:
    automaton = SuffixAutomaton()
    automaton.open(0)
    automaton.append(0, np.array([1, 2, 3, 4, 1, 2], np.int32))
    drafts = speculate(automaton, [0], 3, SpeculationArgs())
    assert drafts.token_ids[0, : drafts.num_nodes[0]].tolist() == [3, 4, 1] and drafts.match_length[0] == 2


def test_sibling_tells_what_comes_next() -> None:
    automaton = SuffixAutomaton()
    for request in (0, 1):
        automaton.open(request)
    automaton.append(0, np.arange(100, dtype=np.int32))
    automaton.append(1, np.array([40, 41], np.int32))
    drafts = speculate(automaton, [1], 8, SpeculationArgs())
    assert drafts.token_ids[0].tolist() == list(range(42, 50))


def test_growth_keeps_everything_and_stays_small() -> None:
    rng = np.random.default_rng(0)
    automaton, step = SuffixAutomaton(), 37
    texts = rng.integers(0, 50, (3, 4000)).astype(np.int32)
    for request in range(3):
        automaton.open(request)
    for start in range(0, 4000, step):
        for request in range(3):
            automaton.append(request, texts[request, start : start + step])
    assert automaton.num_tokens == 12_000
    pairs = {(int(a), int(b)) for text in texts for a, b in pairwise(text)}
    assert all(walk(automaton, pair) is not None for pair in pairs)
    text = tuple(texts[1, 1234:1244].tolist())
    assert walk(automaton, text) is not None
    assert automaton.num_bytes < 100 * automaton.num_tokens


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 11), st.lists(st.integers(0, 7), min_size=1, max_size=4)), max_size=40),
)
def test_arrays_are_always_long_enough(run: int, deltas: list[tuple[int, list[int]]]) -> None:
    """Every sibling of a repetitive prompt may add an edge to each of its suffixes, and all arrays start tiny."""
    automaton, reference = SuffixAutomaton(MAX_CONTEXT, capacity=1), ReferenceIndex(MAX_CONTEXT)
    for index in (automaton, reference):
        index.open(-1)
    automaton.append(-1, np.zeros(run, np.int32))
    reference.append(-1, [0] * run)
    for request in range(12):
        automaton.open(request, like=-1)
        reference.open(request, like=-1)
    for request, tokens in [(request, [request % 8]) for request in range(12)] + deltas:
        automaton.append(request, np.array(tokens, np.int32))
        reference.append(request, tokens)
        assert automaton.heap[kernels.NUM_STATES] <= len(automaton.states)
        assert automaton.heap[kernels.NUM_EDGES] <= len(automaton.edges)
    for token in range(8):
        state = walk(automaton, (0, token))
        assert (0 if state is None else automaton.states[state, kernels.COUNT]) == reference.count((0, token))


def test_siblings_of_a_long_repetitive_prompt_fit() -> None:
    automaton = SuffixAutomaton()
    automaton.open(-1)
    automaton.append(-1, np.zeros(1000, np.int32))
    for request in range(40):
        automaton.open(request, like=-1)
        automaton.append(request, np.array([request + 1], np.int32))
        assert automaton.heap[kernels.NUM_EDGES] <= len(automaton.edges)
    assert automaton.heap[kernels.NUM_EDGES] > 3 * automaton.num_tokens  # the bound of separate texts would not do


def test_one_token_repeated_is_no_trap() -> None:
    automaton = SuffixAutomaton()
    automaton.open(0)
    automaton.append(0, np.zeros(50_000, np.int32))  # counts would take 1.25e9 steps without the bound
    automaton.append(0, np.array([1], np.int32))
    assert walk(automaton, (0, 0, 1)) is not None


def test_misuse_is_refused() -> None:
    automaton = SuffixAutomaton()
    automaton.open(0)
    with pytest.raises(ProtocolError, match="open already"):
        automaton.open(0)
    with pytest.raises(ProtocolError, match="request 7 is not"):
        automaton.open(1, like=7)
    with pytest.raises(ConfigError, match=r"^SuffixAutomaton\.max_context: is 0"):
        SuffixAutomaton(0)
    with pytest.raises(ConfigError, match=r"^SpeculationArgs\.top_k: is 0"):
        SpeculationArgs(top_k=0)
    with pytest.raises(ConfigError, match=r"^SpeculationArgs\.pattern_lookup_min: is 20"):
        SpeculationArgs(pattern_lookup_min=20)
