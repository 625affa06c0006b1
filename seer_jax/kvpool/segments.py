"""The disk tier: append-only files of blocks, each behind its header."""

import errno
import fcntl
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from seer_jax.core.errors import ConfigError, TransferError
from seer_jax.kvpool.blocks import HEADER_BYTES, PIECE_BYTES, BlockHeader, checksum_of, decode_header, encode_header

SUFFIX = ".kvseg"


class Segment:
    """One file. `live` has the digest of each block that counts, by offset; `users` read without the pool's lock."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd
        self.size_bytes, self.live_bytes = 0, 0
        self.live: dict[int, bytes] = {}
        self.users, self.removed = 0, False


class Place(NamedTuple):
    """Where a block's bytes are; its header stands before `offset`."""

    segment: Segment
    offset: int
    payload_bytes: int


class SegmentFiles:
    """The segment files of one directory.

    One thread appends, seals and removes. `keep`, `kill`, `leave` and the fields of segments belong under the pool's
    lock. Anyone may read a place whose segment it uses. Nothing is synced: a machine that crashes leaves torn blocks,
    which are cut off when the directory is opened again; a process that is killed leaves whole ones.
    """

    def __init__(self, directory: Path, segment_bytes: int) -> None:
        """Take the directory, made if missing, for this process.

        Raises:
            ConfigError: If another pool has it.
            OSError: If it cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(directory / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise ConfigError("directory", f"{directory} is in use by another KV pool", "give each its own") from None
        self._directory, self._segment_bytes = directory, segment_bytes
        self.segments: list[Segment] = []
        self.dead: deque[Segment] = deque()
        self.total_bytes = self.truncated_bytes = 0
        self.is_full = False
        self._active: Segment | None = None
        self._next_index = 0

    def recover(self, max_bytes: int) -> Iterator[tuple[BlockHeader, Place]]:
        """Find what earlier pools left, oldest first; cut every file at its first bad block.

        Args:
            max_bytes: Oldest files are deleted unread until the rest is no more than this.

        Yields:
            Header and place of each valid block; the caller keeps or ignores it.
        """
        paths = sorted(path for path in self._directory.glob("*" + SUFFIX) if path.stem.isdigit())
        excess = sum(path.stat().st_size for path in paths) - max_bytes
        for path in paths:
            self._next_index = int(path.stem) + 1
            size = path.stat().st_size
            if excess > 0:
                path.unlink()
                excess -= size
                self.truncated_bytes += size
                continue
            segment = Segment(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))
            self.segments.append(segment)
            yield from self._scan(segment, size)
            if segment.size_bytes < size:
                os.ftruncate(segment.fd, segment.size_bytes)
                self.truncated_bytes += size - segment.size_bytes
            if not segment.live:
                self.dead.append(segment)

    def _scan(self, segment: Segment, size: int) -> Iterator[tuple[BlockHeader, Place]]:
        while segment.size_bytes < size:
            try:
                header = decode_header(os.pread(segment.fd, HEADER_BYTES, segment.size_bytes))
                place = Place(segment, segment.size_bytes + HEADER_BYTES, header.payload_bytes)
                if checksum_of(_pieces(place)) != header.checksum:
                    return
            except TransferError:
                return
            segment.size_bytes += HEADER_BYTES + header.payload_bytes
            self.total_bytes += HEADER_BYTES + header.payload_bytes
            yield header, place

    def append(self, header: BlockHeader, views: Sequence[np.ndarray]) -> Place:
        """Write a block behind the newest file, or to a new one if it would grow too long.

        Raises:
            OSError: If the file system refuses; then nothing of it remains.
        """
        record_bytes = HEADER_BYTES + header.payload_bytes
        active = self._active
        if active is None or (active.size_bytes and active.size_bytes + record_bytes > self._segment_bytes):
            active = self._active = self._create()
        offset = active.size_bytes
        try:
            if self.is_full:
                raise OSError(errno.ENOSPC, "the disk is full, on purpose")
            for view in (np.frombuffer(encode_header(header), np.uint8), *views):
                done = 0
                while done < len(view):
                    done += os.pwrite(active.fd, view[done:], offset + done)
                offset += done
        except OSError:
            self._active = None  # If the tail stays, nothing may come behind it.
            os.ftruncate(active.fd, active.size_bytes)
            self._active = active
            raise
        active.size_bytes = offset
        self.total_bytes += record_bytes
        return Place(active, offset - header.payload_bytes, header.payload_bytes)

    def _create(self) -> Segment:
        path = self._directory / f"{self._next_index:010d}{SUFFIX}"
        segment = Segment(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._next_index += 1
        self.segments.append(segment)
        return segment

    def remove(self, segment: Segment) -> None:
        """Delete a file; its bytes count as free from now on. Readers that are at it may finish."""
        if segment is self._active:
            self._active = None
        segment.path.unlink(missing_ok=True)
        self.segments.remove(segment)
        self.total_bytes -= segment.size_bytes

    def seal(self, segment: Segment) -> None:
        """Append nothing more to it."""
        if segment is self._active:
            self._active = None

    def keep(self, place: Place, digest: bytes) -> None:
        """The block at `place` counts from now on."""
        place.segment.live[place.offset] = digest
        place.segment.live_bytes += HEADER_BYTES + place.payload_bytes

    def kill(self, place: Place) -> None:
        """The block at `place` counts no longer."""
        segment = place.segment
        if segment.live.pop(place.offset, None) is not None:
            segment.live_bytes -= HEADER_BYTES + place.payload_bytes
        if not segment.live:
            self.dead.append(segment)

    def leave(self, segment: Segment) -> None:
        """One reader less; the last one of a removed file closes it."""
        segment.users -= 1
        if segment.removed and not segment.users:
            os.close(segment.fd)

    def retire(self, segment: Segment) -> None:
        """The file is removed: close it when nobody reads."""
        segment.removed = True
        if not segment.users:
            os.close(segment.fd)

    def close(self) -> None:
        """Close all files and let the directory go; what is in them stays."""
        for segment in self.segments:
            self.retire(segment)
        self.segments.clear()
        self.dead.clear()
        os.close(self._lock_fd)


def read_place(place: Place, out: np.ndarray) -> int:
    """Read a block's bytes; returns the xxh3-64 of what arrived.

    Raises:
        OSError: If the file system refuses.
        TransferError: If the file ends before the block does.
    """
    digest = xxhash.xxh3_64()
    for start in range(0, place.payload_bytes, PIECE_BYTES):
        piece = out[start : start + PIECE_BYTES]
        _read_piece(place, start, piece)
        digest.update(piece)
    return digest.intdigest()


def _pieces(place: Place) -> Iterator[np.ndarray]:
    buffer = np.empty(min(PIECE_BYTES, place.payload_bytes), np.uint8)
    for start in range(0, place.payload_bytes, PIECE_BYTES):
        piece = buffer[: place.payload_bytes - start]
        _read_piece(place, start, piece)
        yield piece


def _read_piece(place: Place, start: int, piece: np.ndarray) -> None:
    done = 0
    while done < len(piece):
        count = os.preadv(place.segment.fd, [piece[done:]], place.offset + start + done)
        if not count:
            raise TransferError(f"{place.segment.path} ends inside a block")
        done += count
