"""The group's suffix structure: one generalised suffix automaton over the tokens of all its requests, grown online.

A state stands for the substrings that end at the same positions; following its edge for token t appends t. Beside the
usual links every state counts how often its substrings occur, so that the edges out of a context are the tokens that
followed it, ranked. Counts are exact for contexts of at most `max_context` tokens; longer ones are never asked for,
and not counting them bounds the cost of a token.

All arrays are flat and owned here, all loops over them are compiled by numba (`kernels.py`).
Source: Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985.
"""

import numpy as np

from seer_jax.core.draft import kernels
from seer_jax.core.errors import ConfigError, ProtocolError

FIRST_CAPACITY = 1024
"""Tokens that a new automaton has room for."""
TOKENS_BETWEEN_CHECKS = 4096
"""Tokens appended before the hash table is looked at again; a crowded table is slow, not wrong."""


class SuffixAutomaton:
    """Suffix automaton of one group; append-only, and dropped as a whole.

    Args:
        max_context: Longest context, in tokens, that drafts look up.
        capacity: Tokens to make room for at once; more are taken all the same.

    Attributes:
        num_tokens: Tokens appended so far.

    Raises:
        ConfigError: If `max_context` is below 1.
    """

    def __init__(self, max_context: int = 16, capacity: int = FIRST_CAPACITY) -> None:
        if max_context < 1:
            raise ConfigError("SuffixAutomaton.max_context", f"is {max_context}", "at least 1")
        self.max_context = max_context
        self.num_tokens = 0
        self._num_inherited = 0
        self._cursors: dict[int, int] = {}
        self.heap = np.zeros(kernels.HEAP_FIELDS, np.int64)
        self.cursors = np.zeros((8, kernels.CURSOR_FIELDS), np.int32)
        self.states = np.empty((0, kernels.STATE_FIELDS), np.int32)
        self.edges = np.empty((0, kernels.EDGE_FIELDS), np.int32)
        self._reserve(max(1, capacity))
        self.states[0] = kernels.ROOT
        self.heap[kernels.NUM_STATES] = 1
        self.buckets = np.full(1 << max(1, capacity).bit_length(), -1, np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes in use; the arrays reach further, but memory that was never written takes no room."""
        num_states, num_edges = self.heap[kernels.NUM_STATES], self.heap[kernels.NUM_EDGES]
        used = num_states * self.states[0].nbytes + num_edges * self.edges[0].nbytes
        return int(used) + self.buckets.nbytes + self.cursors.nbytes

    def open(self, request: int, like: int | None = None) -> None:
        """Start a request.

        Args:
            request: Its index in the group, not open yet.
            like: Open request whose tokens so far are its first tokens too, such as the shared prompt; they are not
                stored again.

        Raises:
            ProtocolError: If the request is open, or `like` is not.
        """
        if request in self._cursors or not (like is None or like in self._cursors):
            raise ProtocolError(f"request {request} is open already, or request {like} is not")
        cursor = len(self._cursors)
        if cursor == len(self.cursors):
            self.cursors = np.concatenate([self.cursors, np.zeros_like(self.cursors)])
        self.cursors[cursor] = 0 if like is None else self.cursors[self._cursors[like]]
        self._cursors[request] = cursor
        # What comes after a shared beginning may add an edge to every suffix of it, once per request.
        self._num_inherited += int(self.states[self.cursors[cursor, kernels.WHOLE], kernels.LENGTH])
        self._reserve(self.num_tokens)

    def cursor_of(self, request: int) -> int:
        """Row of an open request in `cursors`."""
        return self._cursors[request]

    def append(self, request: int, token_ids: np.ndarray) -> None:
        """Append tokens to an open request.

        Args:
            request: Its index.
            token_ids: int32 [count].
        """
        self._reserve(self.num_tokens + len(token_ids))
        self.num_tokens += len(token_ids)
        cursor = self.cursors[self._cursors[request]]
        for first in range(0, len(token_ids), TOKENS_BETWEEN_CHECKS):
            if self.heap[kernels.NUM_EDGES] > len(self.buckets):
                self.buckets = np.full(2 * len(self.buckets), -1, np.int32)
                kernels.rehash(self.edges, self.buckets, self.heap)
            tokens = token_ids[first : first + TOKENS_BETWEEN_CHECKS]
            kernels.append(self.states, self.edges, self.buckets, self.heap, cursor, tokens, self.max_context)

    def _reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens in all: at most 2 states a token, 3 edges a token and 1 an inherited one."""
        num_states, num_edges = self.heap.tolist()
        self.states = _grow(self.states, 2 * num_tokens + 1, num_states)
        self.edges = _grow(self.edges, 3 * num_tokens + 1 + self._num_inherited, num_edges)


def _grow(array: np.ndarray, num_rows: int, num_used: int) -> np.ndarray:
    """The array if it is long enough, else one at least twice as long with the used rows."""
    if num_rows <= len(array):
        return array
    longer = np.empty((max(num_rows, 2 * len(array)), array.shape[1]), array.dtype)
    longer[:num_used] = array[:num_used]
    return longer
