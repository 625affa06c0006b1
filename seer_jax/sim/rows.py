"""The requests that run on a simulated instance, as columns of numbers."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

CONTEXT, LEFT, RATE, NOISE, RANK, RESERVED, SHARED, READY, GROUP, INDEX, PROBE, PROMPT = range(NUM_COLUMNS := 12)
"""Tokens known; tokens left of the chunk; tokens a step, 0: not known yet; luck of the chunk, in standard errors of its
mean rate; data-parallel rank; tokens reserved, 0: it grows; those of them that siblings of the rank share; time from
which it decodes; group; index; class; prompt."""


class RunningRows:
    """Struct of arrays over the running requests, the oldest first, and the room that they take.

    Attributes:
        num_growing: Requests without a reservation.
    """

    def __init__(self, *, capacity: int, num_ranks: int, page_size: int) -> None:
        """Start empty.

        Args:
            capacity: Requests at most.
            num_ranks: Data-parallel ranks.
            page_size: Tokens of a page; half of a growing request's last one counts as empty.
        """
        self._store = np.zeros((NUM_COLUMNS, capacity))
        self._size = 0
        self._num_ranks, self._half_page = num_ranks, page_size / 2
        self._reserved = np.zeros(num_ranks)
        self._members: Counter[tuple[int, int]] = Counter()  # Requests of a rank that share a group's prompt.
        self.num_growing = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, column: int) -> np.ndarray:
        """A column: float64 [len(self)], a view to read and write."""
        return self._store[column, : self._size]

    def where(self, chosen: np.ndarray) -> np.ndarray:
        """All columns of some rows: float64 [NUM_COLUMNS, n], a copy."""
        return self._store[:, : self._size][:, chosen]

    def add(self, row: Sequence[float | int]) -> None:
        """Append a request, its columns in order."""
        self._store[:, self._size] = row
        self._size += 1
        self._reserved[int(row[RANK])] += row[RESERVED] - self.num_shared(int(row[RANK]), int(row[GROUP]), row[SHARED])
        if row[SHARED]:
            self._members[int(row[RANK]), int(row[GROUP])] += 1
        self.num_growing += not row[RESERVED]

    def drop(self, row: int) -> None:
        """Remove a request; those behind it move up."""
        store, size = self._store, self._size
        rank, group, shared = int(store[RANK, row]), int(store[GROUP, row]), store[SHARED, row]
        if shared:
            self._members[rank, group] -= 1
        self._reserved[rank] -= store[RESERVED, row] - self.num_shared(rank, group, shared)
        self.num_growing -= not store[RESERVED, row]
        store[:, row : size - 1] = store[:, row + 1 : size]
        self._size -= 1

    def num_shared(self, rank: int, group: int, shared: float | int) -> float | int:
        """Of so many tokens that a request could share, those that siblings in a rank hold for it."""
        return shared if self._members[rank, group] else 0.0

    def used(self) -> np.ndarray:
        """Tokens of room taken in each rank: float64 [ranks]."""
        if not self.num_growing:
            return self._reserved.copy()
        return self._reserved + self._of_growing(self[CONTEXT] + self._half_page)

    def growth(self) -> np.ndarray:
        """Tokens by which a step makes the growing requests of each rank longer: float64 [ranks]."""
        return self._of_growing(self[RATE]) if self.num_growing else np.zeros(self._num_ranks)

    def _of_growing(self, values: np.ndarray) -> np.ndarray:
        values = np.where(self[RESERVED] == 0, values, 0.0)
        if self._num_ranks == 1:
            return values.sum(keepdims=True)
        return np.bincount(self[RANK].astype(np.int64), values, minlength=self._num_ranks)
