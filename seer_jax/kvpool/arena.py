"""The DRAM tier: one buffer, given out in extents."""

import bisect
from collections.abc import Iterator

import numpy as np
import xxhash

from seer_jax.kvpool.blocks import PIECE_BYTES

ALIGN_BYTES = 4096


class Slot:
    """Memory of one block.

    Attributes:
        extents: Start and size of each, multiples of `ALIGN_BYTES`.
        payload_bytes: Bytes of the block.
        size_bytes: Bytes of the extents.
        users: Readers and writers that are at it, without the pool's lock.
        released: Free it when the last of them is done.
    """

    def __init__(self, extents: list[tuple[int, int]], payload_bytes: int) -> None:
        self.extents, self.payload_bytes = extents, payload_bytes
        self.size_bytes = sum(size for _, size in extents)
        self.users, self.released = 0, False


class Arena:
    """A fixed amount of memory. Allocation and release belong under the pool's lock, copies do not.

    A block may lie in several extents, so free memory is never too scattered to be used. No copy is made but the
    caller's: one in, one out.
    """

    def __init__(self, size_bytes: int) -> None:
        """Reserve address space; the system gives memory when it is first written."""
        self.size_bytes = size_bytes // ALIGN_BYTES * ALIGN_BYTES
        self.free_bytes = self.least_free_bytes = self.size_bytes
        self._buffer = np.empty(self.size_bytes, np.uint8)
        self._free: list[tuple[int, int]] = [(0, self.size_bytes)] if self.size_bytes else []

    def allocate(self, payload_bytes: int) -> Slot | None:
        """Take memory: one extent if any is large enough, else several; None if there is not enough."""
        needed = slot_bytes(payload_bytes)
        if needed > self.free_bytes:
            return None
        taken: list[tuple[int, int]] = []
        whole = next((index for index, (_, size) in enumerate(self._free) if size >= needed), None)
        index = 0 if whole is None else whole
        while needed:
            start, size = self._free[index]
            part = min(size, needed)
            taken.append((start, part))
            if part == size:
                del self._free[index]
            else:
                self._free[index] = (start + part, size - part)
            needed -= part
        slot = Slot(taken, payload_bytes)
        self.free_bytes -= slot.size_bytes
        self.least_free_bytes = min(self.least_free_bytes, self.free_bytes)
        return slot

    def free(self, slot: Slot) -> None:
        """Give memory back; neighbours become one extent."""
        self.free_bytes += slot.size_bytes
        for start, size in slot.extents:
            index = bisect.bisect(self._free, (start, 0))
            if index < len(self._free) and self._free[index][0] == start + size:
                size += self._free.pop(index)[1]
            if index and sum(self._free[index - 1]) == start:
                index -= 1
                start = self._free[index][0]
                size += self._free.pop(index)[1]
            self._free.insert(index, (start, size))

    def views(self, slot: Slot) -> Iterator[np.ndarray]:
        """The block's bytes in place, extent by extent."""
        left = slot.payload_bytes
        for start, size in slot.extents:
            yield self._buffer[start : start + min(size, left)]
            left -= min(size, left)

    def write(self, slot: Slot, data: np.ndarray) -> int:
        """Copy a block in; returns its xxh3-64."""
        return copy_both_ways(self.views(slot), data, inwards=True)

    def read(self, slot: Slot, out: np.ndarray) -> int:
        """Copy a block out; returns the xxh3-64 of what arrived."""
        return copy_both_ways(self.views(slot), out, inwards=False)


def slot_bytes(payload_bytes: int) -> int:
    """Memory that a block takes."""
    return -(-payload_bytes // ALIGN_BYTES) * ALIGN_BYTES


def copy_both_ways(views: Iterator[np.ndarray], flat: np.ndarray, *, inwards: bool) -> int:
    """Copy between extents and a flat array piece by piece; the hash is of the flat side."""
    digest = xxhash.xxh3_64()
    done = 0
    for view in views:
        for start in range(0, len(view), PIECE_BYTES):
            stored = view[start : start + PIECE_BYTES]
            piece = flat[done : done + len(stored)]
            if inwards:
                stored[:] = piece
            else:
                piece[:] = stored
            digest.update(piece)
            done += len(stored)
    return digest.intdigest()
