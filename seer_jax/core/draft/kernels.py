"""The compiled loops of the suffix automaton: append, look up, draft. Array layouts are declared here.

`states` int32 [N, 6]: suffix link (-1 at the root), length of the longest substring, occurrences, token and target of
the first edge (target 0 = no edge), index of the next edge in `edges` (-1 = none).
`edges` int32 [M, 5]: state, token, target, next edge of the same state, next edge of the same bucket. Only what does
not fit into a state: most states have one edge.
`buckets` int32 [power of two]: hash table from (state, token) to the first index in `edges`; -1 = empty.
`heap` int64 [2]: states and edges in use.
A cursor int32 [3] is a request's place: the state of all its tokens; state and length of their longest counted suffix.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINK, LENGTH, COUNT, TOKEN, TARGET, MORE = range(6)
STATE_FIELDS = 6
ROOT = np.array([-1, 0, 0, 0, 0, -1], np.int32)
EDGE_STATE, EDGE_TOKEN, EDGE_TARGET, EDGE_NEXT, EDGE_CHAIN = range(5)
EDGE_FIELDS = 5
NUM_STATES, NUM_EDGES = range(2)
HEAP_FIELDS = 2
WHOLE, SUFFIX, SUFFIX_LENGTH = range(3)
CURSOR_FIELDS = 3
UNSEEN = 0.5
"""Occurrences that a context's unseen continuations are taken to have: one occurrence alone is no certainty. On real
groups this gives 3.29 instead of 3.21 accepted tokens at 17 drafted nodes; 0.5, 1 and 2 differ by less than 0.01."""
NUM_BINS = 16
"""Bins by which verification corrects what the counts say: contexts of 1, 2, ... tokens, and all longer ones. On real
groups a continuation seen once is right in 0.38 of all cases after one token and 0.86 after 15; the counts say 0.67."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba; calls release the GIL and the machine code is kept between runs.

    numba keeps it until the function's own file changes. A function that calls kernels of another file must therefore
    be compiled anew every time (`numba.njit`), or it would go on with the old ones.
    """
    # Under pytest the function is wrapped in a type checker, which numba cannot read.
    return numba.njit(inspect.unwrap(function), cache=True, nogil=True)


@compiled
def find(states, edges, buckets, state, token):
    """Target of a state's edge for a token; 0 if there is none."""
    if states[state, TARGET] != 0 and states[state, TOKEN] == token:
        return states[state, TARGET]
    if states[state, MORE] < 0:
        return 0
    index = find_edge(edges, buckets, state, token)
    return edges[index, EDGE_TARGET] if index >= 0 else 0


@compiled
def find_edge(edges, buckets, state, token):
    """Index in `edges` of a state's edge for a token; -1 if there is none."""
    index = buckets[hash_of(state, token) & (len(buckets) - 1)]
    while index >= 0 and not (edges[index, EDGE_STATE] == state and edges[index, EDGE_TOKEN] == token):
        index = edges[index, EDGE_CHAIN]
    return index


@compiled
def hash_of(state, token):
    """Mix two 32-bit numbers (the finaliser of MurmurHash3)."""
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(token)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    return np.int64(mixed & np.uint64(0x7FFFFFFF))


@compiled
def add_edge(states, edges, buckets, heap, state, token, target):
    """Give a state an edge that it does not have."""
    if states[state, TARGET] == 0:
        states[state, TOKEN], states[state, TARGET] = token, target
        return
    index = heap[NUM_EDGES]
    heap[NUM_EDGES] = index + 1
    edges[index, EDGE_STATE], edges[index, EDGE_TOKEN], edges[index, EDGE_TARGET] = state, token, target
    edges[index, EDGE_NEXT] = states[state, MORE]
    states[state, MORE] = index
    insert(edges, buckets, index)


@compiled
def insert(edges, buckets, index):
    """Enter an edge into the hash table."""
    bucket = hash_of(edges[index, EDGE_STATE], edges[index, EDGE_TOKEN]) & (len(buckets) - 1)
    edges[index, EDGE_CHAIN] = buckets[bucket]
    buckets[bucket] = index


@compiled
def rehash(edges, buckets, heap):
    """Enter all edges into an empty table."""
    for index in range(heap[NUM_EDGES]):
        insert(edges, buckets, index)


@compiled
def redirect(states, edges, buckets, state, token, target):
    """Change the target of an edge."""
    if states[state, TOKEN] == token:
        states[state, TARGET] = target
    else:
        edges[find_edge(edges, buckets, state, token), EDGE_TARGET] = target


@compiled
def clone(states, edges, buckets, heap, parent, token, original):
    """Split off the shorter substrings of `original`, those that end in an occurrence of `parent` plus `token`."""
    copy = heap[NUM_STATES]
    heap[NUM_STATES] = copy + 1
    states[copy] = states[original]
    states[copy, LENGTH] = states[parent, LENGTH] + 1
    states[copy, MORE] = -1
    index = states[original, MORE]
    while index >= 0:
        add_edge(states, edges, buckets, heap, copy, edges[index, EDGE_TOKEN], edges[index, EDGE_TARGET])
        index = edges[index, EDGE_NEXT]
    states[original, LINK] = copy
    while parent >= 0 and find(states, edges, buckets, parent, token) == original:
        redirect(states, edges, buckets, parent, token, copy)
        parent = states[parent, LINK]
    return copy


@compiled
def extend(states, edges, buckets, heap, last, token):
    """Append a token to the request whose whole text is state `last`; returns the state of the longer text."""
    known = find(states, edges, buckets, last, token)
    if known:
        if states[known, LENGTH] == states[last, LENGTH] + 1:
            return known
        return clone(states, edges, buckets, heap, last, token, known)
    new = heap[NUM_STATES]
    heap[NUM_STATES] = new + 1
    states[new, LENGTH] = states[last, LENGTH] + 1
    states[new, COUNT] = states[new, TARGET] = states[new, TOKEN] = 0
    states[new, MORE] = -1
    parent = last
    while parent >= 0:
        known = find(states, edges, buckets, parent, token)
        if known:
            break
        add_edge(states, edges, buckets, heap, parent, token, new)
        parent = states[parent, LINK]
    if parent < 0:
        states[new, LINK] = 0
    elif states[known, LENGTH] == states[parent, LENGTH] + 1:
        states[new, LINK] = known
    else:
        copy = clone(states, edges, buckets, heap, parent, token, known)
        states[new, LINK] = copy
    return new


@compiled
def shorten(states, state, length, most):
    """State and length of the longest suffix of a context that has at most `most` tokens."""
    if length > most:
        length = most
    # Also mends a place whose state was split since it was noted.
    while state > 0 and length <= states[states[state, LINK], LENGTH]:
        state = states[state, LINK]
    return state, length


@compiled
def append(states, edges, buckets, heap, cursor, token_ids, max_context):
    """Append tokens to a request."""
    for token in token_ids:
        cursor[WHOLE] = extend(states, edges, buckets, heap, cursor[WHOLE], token)
        state, length = shorten(states, cursor[SUFFIX], cursor[SUFFIX_LENGTH], max_context - 1)
        state = find(states, edges, buckets, state, token)
        cursor[SUFFIX], cursor[SUFFIX_LENGTH] = state, length + 1
        while state > 0:
            states[state, COUNT] += 1
            state = states[state, LINK]


@compiled
def follow(states, state, length, most):
    """State and length of the longest suffix of a context, of at most `most` tokens, that something followed."""
    state, length = shorten(states, state, length, most)
    while state > 0 and states[state, TARGET] == 0:
        state = states[state, LINK]
        length = min(length, states[state, LENGTH])
    return state, length


@compiled
def rank_edges(states, edges, state, most, counts, tokens_and_targets):
    """Write the commonest edges of a state, most first and the newest of equals first.

    Returns how many, and the occurrences of all its edges. Preferring the newest of equals gives 2.69 instead of 2.67
    accepted tokens on real groups, the oldest would cost as much.
    """
    total, num_ranked = np.int64(0), 0
    edge = states[state, MORE]
    while True:
        # The edge in the state itself is the oldest, the others are listed newest first.
        if edge >= 0:
            token, target, edge = edges[edge, EDGE_TOKEN], edges[edge, EDGE_TARGET], edges[edge, EDGE_NEXT]
        else:
            token, target, edge = states[state, TOKEN], states[state, TARGET], np.int32(-2)
        count = np.int64(states[target, COUNT])
        total += count
        if num_ranked < most or count > counts[num_ranked - 1]:
            num_ranked = min(num_ranked + 1, most)
            place = num_ranked - 1
            while place > 0 and counts[place - 1] < count:
                counts[place] = counts[place - 1]
                tokens_and_targets[place] = tokens_and_targets[place - 1]
                place -= 1
            counts[place] = count
            tokens_and_targets[place, 0], tokens_and_targets[place, 1] = token, target
        if edge == -2:
            return num_ranked, total


@intrinsic
def _pointer(typing_context, address):
    """Turn an address into a pointer that `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@compiled
def bin_of(length):
    """Bin of what follows a context of at least one token."""
    return min(length, NUM_BINS) - 1


@compiled
def draft(
    states,
    edges,
    cursor,
    budget,
    max_depth,
    max_context,
    min_context,
    top_k,
    min_probability,
    max_depth_per_match,
    calibration,
    token_ids,
    parents,
    scores,
    conditionals,
    bins,
):
    """Draft for one request into rows of length >= budget; returns the number of nodes and the matched length.

    No node scores above its parent, whatever the `calibration`: the first n nodes are the n best.
    """
    # The longest match of a request's own end is that end itself, which nothing follows.
    state, length = follow(states, cursor[SUFFIX], cursor[SUFFIX_LENGTH], max_context - 1)
    match_length = length
    if length < min_context or budget < 1:
        return 0, match_length
    max_depth = min(max_depth, int(max_depth_per_match * match_length))

    # Candidates: nodes whose parent is in the tree. The best is taken, its children join.
    most = (budget + 1) * top_k
    candidates = np.empty((most, 6), np.int32)  # parent, depth, token, state, length of its context, bin
    chances, counted = np.empty(most, np.float64), np.empty(most, np.float32)  # score, conditional
    counts, ranked = np.empty(top_k, np.int64), np.empty((top_k, 2), np.int32)
    num_candidates, num_nodes, node, depth, probability = 0, 0, -1, 0, 1.0
    while True:
        if depth < max_depth and length >= min_context:
            num_ranked, total = rank_edges(states, edges, state, top_k, counts, ranked)
            for k in range(num_ranked):
                score = min(probability * counts[k] / (total + UNSEEN) * calibration[bin_of(length)], probability)
                if score >= min_probability:
                    candidates[num_candidates, 0], candidates[num_candidates, 1] = node, depth + 1
                    candidates[num_candidates, 2], candidates[num_candidates, 3] = ranked[k, 0], ranked[k, 1]
                    candidates[num_candidates, 4], candidates[num_candidates, 5] = length + 1, bin_of(length)
                    chances[num_candidates], counted[num_candidates] = score, counts[k] / (total + UNSEEN)
                    num_candidates += 1
        if num_candidates == 0 or num_nodes == budget:
            return num_nodes, match_length
        best = 0
        for k in range(1, num_candidates):
            if chances[k] > chances[best]:
                best = k
        node, probability = num_nodes, chances[best]
        parents[node], depth, token_ids[node] = candidates[best, 0], candidates[best, 1], candidates[best, 2]
        scores[node], conditionals[node], bins[node] = probability, counted[best], candidates[best, 5]
        state, length = follow(states, candidates[best, 3], candidates[best, 4], max_context - 1)
        num_nodes += 1
        num_candidates -= 1
        candidates[best], chances[best] = candidates[num_candidates], chances[num_candidates]
        counted[best] = counted[num_candidates]


@compiled
def draft_batch(
    places,
    budgets,
    max_depth,
    max_context,
    min_context,
    top_k,
    min_probability,
    max_depth_per_match,
    calibration,
    token_ids,
    parents,
    scores,
    conditionals,
    bins,
    num_nodes,
    match_length,
):
    for r in range(len(places)):
        num_states = 1 << 31  # Bounds are not checked; the links stay inside.
        states = numba.carray(_pointer(places[r, 0]), (num_states, STATE_FIELDS), np.int32)
        edges = numba.carray(_pointer(places[r, 1]), (num_states, EDGE_FIELDS), np.int32)
        cursor = numba.carray(_pointer(places[r, 2]), (CURSOR_FIELDS,), np.int32)
        num_nodes[r], match_length[r] = draft(
            states,
            edges,
            cursor,
            budgets[r],
            max_depth,
            min(max_context, places[r, 3]),
            min_context,
            top_k,
            min_probability,
            max_depth_per_match,
            calibration,
            token_ids[r],
            parents[r],
            scores[r],
            conditionals[r],
            bins[r],
        )
