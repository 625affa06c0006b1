"""The default pool: memory of this process, then files of this machine."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seer_jax.core.errors import ConfigError, TransferError
from seer_jax.kvpool.arena import Arena, slot_bytes
from seer_jax.kvpool.blocks import BlockHeader, bytes_by_key, type_name
from seer_jax.kvpool.index import Entry, Index
from seer_jax.kvpool.keys import BlockKey
from seer_jax.kvpool.pool import PoolStats, Status
from seer_jax.kvpool.segments import Place, SegmentFiles, read_place
from seer_jax.kvpool.spill import Spiller

DIRTY_SHARE = 0.75
"""Share of DRAM that may hold blocks which are not on disk before they are written there without need."""
MIN_SEGMENT_BYTES = 64 << 10
FORGOTTEN_AT_ONCE = 256
"""Blocks dropped under one hold of the lock, so that others get in between."""


class EmbeddedKVPool:
    """A `KVPool` of bounded memory and bounded disk.

    A put copies into DRAM. A thread writes what is worth least to disk; a put that finds DRAM full waits for it. A get
    copies out of DRAM or reads from disk straight into the caller's buffer, and checks the bytes either way.
    """

    def __init__(
        self,
        max_dram_bytes: int,
        *,
        directory: str | os.PathLike | None = None,
        max_disk_bytes: int = 0,
        segment_bytes: int | None = None,
        keeps_files: bool = True,
        put_timeout_s: float = 10.0,
    ) -> None:
        """Open the pool and find the blocks that an earlier one left in `directory`.

        Args:
            max_dram_bytes: Memory for blocks; a block that is larger is refused.
            directory: For segment files; None = DRAM only.
            max_disk_bytes: Most bytes of all files.
            segment_bytes: Length of a file, more only if a single block is; None = 1/64 of the disk.
            keeps_files: Whether files outlive pools: else those that are there are deleted, and its own by `close`.
            put_timeout_s: Longest that putting one block waits for memory.

        Raises:
            ConfigError: If a size makes no sense or the directory is in use.
            OSError: If the directory cannot be read or written.
        """
        if max_dram_bytes < 0:
            raise ConfigError("max_dram_bytes", f"is {max_dram_bytes}, must not be negative")
        self._max_disk_bytes, self._put_timeout_s = max_disk_bytes, put_timeout_s
        self._spiller: Spiller | None = None
        self._keeps_files = keeps_files
        files = None
        if directory is not None:
            segment_bytes = segment_bytes or max(MIN_SEGMENT_BYTES, max_disk_bytes // 64)
            if max_disk_bytes < 4 * segment_bytes:
                raise ConfigError(
                    "max_disk_bytes", f"is {max_disk_bytes}, less than 4 segments of {segment_bytes} bytes"
                )
            files = SegmentFiles(Path(directory), segment_bytes)
        self._index = Index(Arena(max_dram_bytes), files)
        if files is not None:
            try:
                for header, place in files.recover(max_disk_bytes - segment_bytes if keeps_files else 0):
                    self._adopt(header, place)
            except BaseException:
                files.close()
                raise
            self._spiller = Spiller(
                self._index,
                files,
                limit_bytes=max_disk_bytes - segment_bytes,
                dirty_limit_bytes=int(DIRTY_SHARE * max_dram_bytes),
            )

    def put_blocks(
        self, keys: Sequence[BlockKey], buffers: Sequence[np.ndarray], *, priority: float = 0.0
    ) -> list[Status]:
        """See `KVPool`."""
        flats = bytes_by_key(keys, buffers)
        if math.isnan(priority):
            raise ValueError("a priority is a number")
        return [self._put(key, buffer, flat, priority) for key, buffer, flat in zip(keys, buffers, flats, strict=True)]

    def get_blocks(self, keys: Sequence[BlockKey], outs: Sequence[np.ndarray]) -> list[Status]:
        """See `KVPool`."""
        flats = bytes_by_key(keys, outs)
        if not all(out.flags.writeable for out in outs):
            raise ValueError("a block cannot be read into a read-only array")
        return [self._get(key, out, flat) for key, out, flat in zip(keys, outs, flats, strict=True)]

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `KVPool`."""
        with self._index.changed:
            entries = [self._index.entries.get(key.digest) for key in keys]
            return [entry is not None and entry.header is not None for entry in entries]

    def pin(self, keys: Sequence[BlockKey]) -> None:
        """See `KVPool`. Pinned blocks may be moved to disk."""
        with self._index.changed:
            for key in keys:
                self._index.pin(key.digest)

    def unpin(self, keys: Sequence[BlockKey]) -> None:
        """See `KVPool`."""
        with self._index.changed:
            for key in keys:
                self._index.unpin(key.digest)
            self._index.changed.notify_all()

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """See `KVPool`. A dropped block may be found again if the directory is opened again before its file is gone."""
        self._forget([key.digest for key in keys])

    def drop_epochs_before(self, epoch: int) -> int:
        """See `KVPool`."""
        with self._index.changed:
            old = [digest for digest, entry in self._index.entries.items() if entry.key.epoch < epoch]
        self._forget(old)
        with self._index.changed:
            self._index.unstick()
            self._index.changed.notify_all()
        return len(old)

    def stats(self) -> PoolStats:
        """See `KVPool`."""
        index = self._index
        with index.changed:
            return PoolStats(
                num_blocks=sum(entry.header is not None for entry in index.entries.values()),
                num_pinned=len(index.pins),
                dram_bytes=index.arena.size_bytes - index.arena.free_bytes,
                max_dram_bytes=index.arena.size_bytes,
                disk_bytes=index.files.total_bytes if index.files else 0,
                max_disk_bytes=self._max_disk_bytes if index.files else 0,
                truncated_bytes=index.files.truncated_bytes if index.files else 0,
                **index.counts,
            )

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Write everything to disk, for a pool opened on the directory later; False if not all of it went in time."""
        index = self._index
        if self._spiller is None:
            return False
        with index.changed:
            index.unstick()
            self._spiller.num_waiting += 1
            index.changed.notify_all()
            index.changed.wait_for(
                lambda: not index.can_spill or not (len(index.dirty) or index.num_spilling), timeout_s
            )
            self._spiller.num_waiting -= 1
            return not index.dirty_bytes

    def close(self) -> None:
        """See `KVPool`. Files stay; what is in DRAM only is lost, unless `flush` came before."""
        index = self._index
        with index.changed:
            if index.closed:
                return
            index.closed = True
            index.changed.notify_all()
        if self._spiller is not None:
            self._spiller.join()
        with index.changed:
            if index.files is not None:
                paths = [segment.path for segment in index.files.segments]
                index.files.close()
                for path in () if self._keeps_files else paths:
                    path.unlink(missing_ok=True)
            index.clear()

    def flip_bit(self, key: BlockKey, bit: int = 0) -> bool:
        """Damage a stored block, for tests and for chaos on purpose; False if it is not there."""
        index = self._index
        with index.changed:
            entry = index.entries.get(key.digest)
            if entry is None or entry.header is None:
                return False
            if entry.slot is not None:
                view = next(index.arena.views(entry.slot))
                view[bit // 8] ^= 1 << bit % 8
            else:
                fd, offset = entry.place.segment.fd, entry.place.offset + bit // 8
                os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1 << bit % 8]), offset)
            return True

    def fill_disk(self) -> None:
        """Let the disk refuse whatever is still to be written, as a full one does; for tests and chaos on purpose."""
        if self._index.files is not None:
            self._index.files.is_full = True

    def _adopt(self, header: BlockHeader, place: Place) -> None:
        index, digest = self._index, header.key.digest
        if digest in index.entries:
            return
        entry = Entry(header.key)
        entry.header, entry.place = header, place
        index.files.keep(place, digest)
        index.entries[digest] = entry
        index.ranks.use(digest, header.priority)
        index.requeue(entry)
        index.counts["num_recovered"] += 1

    def _forget(self, digests: Sequence[bytes]) -> None:
        index = self._index
        for first in range(0, len(digests), FORGOTTEN_AT_ONCE):
            with index.changed:
                for digest in digests[first : first + FORGOTTEN_AT_ONCE]:
                    if digest in index.entries:
                        index.remove(index.entries[digest])

    def _put(self, key: BlockKey, buffer: np.ndarray, flat: np.ndarray, priority: float) -> Status:
        index = self._index
        with index.changed:
            entry, status = self._begin_put(key, len(flat), priority)
            if entry is None:
                return status
            slot, arena = entry.slot, index.arena
        checksum = None
        try:
            checksum = arena.write(slot, flat)
        finally:
            with index.changed:
                index.num_filling -= 1
                index.leave_slot(slot)
                if checksum is None:
                    index.remove(entry)
                elif not entry.gone:
                    entry.header = BlockHeader(
                        key=key,
                        dtype=type_name(buffer.dtype),
                        shape=buffer.shape,
                        priority=priority,
                        payload_bytes=len(flat),
                        checksum=checksum,
                    )
                    index.requeue(entry)
                    index.counts["num_stored"] += 1
                index.changed.notify_all()
        return Status.STORED

    def _begin_put(self, key: BlockKey, payload_bytes: int, priority: float) -> tuple[Entry | None, Status]:
        """Take memory for a block and its name, waiting if need be; no entry if there is nothing to copy."""
        index, digest = self._index, key.digest
        deadline = time.monotonic() + self._put_timeout_s
        retried: Entry | None = None
        while True:
            entry = index.entries.get(digest)
            if entry is not None and entry.header is not None:
                index.ranks.use(digest, priority)
                return None, Status.STORED
            if entry is None:
                if index.closed or slot_bytes(payload_bytes) > index.arena.size_bytes:
                    return None, self._refuse(Status.NO_SPACE)
                slot = index.take_memory(payload_bytes, math.inf if index.pins[digest] else priority)
                if slot is not None:
                    break
                if not index.may_get_memory():
                    may_retry = retried is None or retried.place is not None
                    retried = index.unstick_pinned() if may_retry else None
                    if retried is None:
                        return None, self._refuse(Status.NO_SPACE)
            if not self._wait(deadline):
                return None, self._refuse(Status.TIMEOUT)
        entry = Entry(key)
        entry.slot = slot
        slot.users += 1
        index.num_filling += 1
        index.entries[digest] = entry
        index.ranks.use(digest, priority)
        return entry, Status.STORED

    def _wait(self, deadline: float) -> bool:
        """Let others go on, the spilling thread above all; False if the time is over."""
        index, started = self._index, time.monotonic()
        if self._spiller is not None:
            self._spiller.num_waiting += 1
            index.changed.notify_all()
        index.changed.wait(max(0.0, deadline - started))
        if self._spiller is not None:
            self._spiller.num_waiting -= 1
        index.counts["put_wait_s"] += time.monotonic() - started
        return time.monotonic() < deadline

    def _refuse(self, status: Status) -> Status:
        self._index.counts["num_refused" if status is Status.NO_SPACE else "num_timeouts"] += 1
        return status

    def _get(self, key: BlockKey, out: np.ndarray, flat: np.ndarray) -> Status:
        index = self._index
        with index.changed:
            entry = index.entries.get(key.digest)
            if entry is None or entry.header is None:
                index.counts["num_misses"] += 1
                return Status.MISS
            header, slot, place, arena = entry.header, entry.slot, entry.place, index.arena
            if not header.describes(out):
                index.counts["num_corrupt"] += 1
                return Status.CORRUPT
            holder = place.segment if slot is None else slot
            holder.users += 1
        checksum, num_errors = None, 0
        try:
            checksum = read_place(place, flat) if slot is None else arena.read(slot, flat)
        except (OSError, TransferError):
            num_errors = 1
        finally:
            with index.changed:
                if slot is None:
                    index.files.leave(holder)
                else:
                    index.leave_slot(slot)
                index.counts["num_disk_errors"] += num_errors
                is_sound = checksum == header.checksum
                if is_sound:
                    index.counts["num_hits"] += 1
                    if not entry.gone:
                        index.ranks.use(key.digest)
                else:
                    index.counts["num_corrupt"] += 1
                    index.remove(entry)
        return Status.HIT if is_sound else Status.CORRUPT
