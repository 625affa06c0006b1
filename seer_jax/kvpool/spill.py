"""The thread that moves blocks from DRAM to disk and keeps the disk within its limit."""

import dataclasses
import errno
import threading
from collections.abc import Sequence

import numpy as np

from seer_jax.core.errors import TransferError
from seer_jax.kvpool.arena import Slot
from seer_jax.kvpool.blocks import HEADER_BYTES, BlockHeader
from seer_jax.kvpool.index import Entry, Index
from seer_jax.kvpool.segments import Place, Segment, SegmentFiles, read_place

MOST_LIVE = 0.875
"""A file that lives more than this is never moved: too much writing for too little room."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class Spiller:
    """Writes the least valuable blocks to disk while DRAM holds too many unwritten ones, or a put waits.

    The lock is held for the books only, never over a read, a write or the deletion of a file.
    """

    def __init__(self, index: Index, files: SegmentFiles, *, limit_bytes: int, dirty_limit_bytes: int) -> None:
        """Start the thread.

        Args:
            index: Books of the pool.
            files: Its segment files; from now on only this thread adds and removes any.
            limit_bytes: Most bytes of all files, less a segment that compaction needs on the way.
            dirty_limit_bytes: Memory of unwritten blocks above which writing starts.
        """
        self._index, self._files = index, files
        self._limit_bytes, self._dirty_limit_bytes = limit_bytes, dirty_limit_bytes
        self.num_waiting = 0
        """Puts and flushes that want blocks written; under the lock."""
        self._thread = threading.Thread(target=self._run, name="kvpool-spill", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, which ends when the pool is closed."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._run_until_closed()
        finally:  # A bug here must cost blocks, not make every put wait.
            with self._index.changed:
                self._index.stop_spilling()

    def _run_until_closed(self) -> None:
        index = self._index
        while True:
            with index.changed:
                index.changed.wait_for(self._has_work)
                if index.closed:
                    return
                dead = self._files.dead.popleft() if self._files.dead else None
                if dead is None:
                    entry, slot, header = self._begin()
            if dead is not None:
                self._delete(dead)
                continue
            place = self._write(header, list(index.arena.views(slot)))
            with index.changed:
                self._end(entry, slot, place)

    def _has_work(self) -> bool:
        index = self._index
        wanted = self.num_waiting or index.dirty_bytes > self._dirty_limit_bytes
        return bool(index.closed or self._files.dead or (wanted and len(index.dirty)))

    def _begin(self) -> tuple[Entry, Slot, BlockHeader]:
        index = self._index
        digest = index.dirty.peek()
        entry = index.entries[digest]
        entry.spilling = True
        entry.slot.users += 1
        index.num_spilling += 1
        index.requeue(entry)
        return entry, entry.slot, dataclasses.replace(entry.header, priority=index.ranks[digest][0])

    def _end(self, entry: Entry, slot: Slot, place: Place | None) -> None:
        index = self._index
        entry.spilling = False
        index.num_spilling -= 1
        index.leave_slot(slot)
        if place is not None:
            self._files.keep(place, entry.key.digest)
            if entry.gone:
                self._files.kill(place)
            else:
                entry.place = place
        else:
            entry.stuck = True  # It stays in DRAM until a put needs the memory.
        index.requeue(entry)
        index.changed.notify_all()

    def _write(self, header: BlockHeader, views: Sequence[np.ndarray]) -> Place | None:
        """Append a block, making room at the expense of blocks worth less; None if the disk will not have it."""
        needed = HEADER_BYTES + header.payload_bytes
        if not self._make_room(self._limit_bytes - needed, header.key.digest):
            return None
        place, error = self._append(header, views)
        if error in FULL and self._make_room(self._files.total_bytes - needed, header.key.digest):
            place, _ = self._append(header, views)
        return place

    def _append(self, header: BlockHeader, views: Sequence[np.ndarray]) -> tuple[Place | None, int | None]:
        """Append a block; its place, or None and the error's number."""
        try:
            place = self._files.append(header, views)
        except OSError as error:
            self._count("num_disk_errors")
            return None, error.errno
        self._count("num_spilled")
        self._count("spilled_bytes", HEADER_BYTES + header.payload_bytes)
        return place, None

    def _count(self, name: str, number: int = 1) -> None:
        with self._index.changed:
            self._index.counts[name] += number

    def _make_room(self, most_bytes: int, digest: bytes) -> bool:
        """Delete files until the rest is `most_bytes`, for a block that is worth more than what is evicted on the way.

        Blocks are evicted in order of their value until some file is mostly dead; what lives of that one is moved.
        When there is nothing to evict, files with less dead in them are worth moving too.
        """
        index, files = self._index, self._files
        while files.total_bytes > most_bytes:
            with index.changed:
                segment = min(files.segments, key=lambda each: each.live_bytes / max(1, each.size_bytes), default=None)
                if most_bytes < 0 or segment is None or index.closed:
                    return False
                if 2 * segment.live_bytes > segment.size_bytes:
                    victim = index.on_disk.peek()
                    if digest not in index.ranks:
                        return False  # Dropped in the meantime.
                    if victim is not None and index.ranks[victim] < index.ranks[digest]:
                        index.counts["num_evicted"] += 1
                        index.remove(index.entries[victim])
                        continue
                    if segment.live_bytes > MOST_LIVE * segment.size_bytes:
                        return False
            self._move_out(segment)
            if not self._delete(segment):
                return False
        return most_bytes >= 0

    def _move_out(self, segment: Segment) -> None:
        """Write the live blocks of a file to the newest one."""
        index = self._index
        self._files.seal(segment)
        with index.changed:
            entries = [index.entries[digest] for digest in segment.live.values()]
            moves = [(entry, entry.header, entry.place) for entry in entries]
        for entry, header, place in moves:
            payload = np.empty(place.payload_bytes, np.uint8)
            try:
                is_sound = read_place(place, payload) == header.checksum
            except (OSError, TransferError):
                is_sound = False
                self._count("num_disk_errors")
            moved = self._append(header, [payload])[0] if is_sound else None
            with index.changed:
                if moved is not None:
                    self._files.keep(moved, entry.key.digest)
                if entry.gone:
                    if moved is not None:
                        self._files.kill(moved)
                elif moved is not None:
                    entry.place = moved
                    self._files.kill(place)
                else:
                    index.counts["num_evicted" if is_sound else "num_corrupt"] += 1
                    index.remove(entry)

    def _delete(self, segment: Segment) -> bool:
        """Delete a file without live blocks; False if it has some again or the file system refuses."""
        with self._index.changed:
            if segment.live or segment.removed:
                return segment.removed
        try:
            self._files.remove(segment)
        except OSError:
            self._count("num_disk_errors")
            return False
        with self._index.changed:
            self._files.retire(segment)
        return True
