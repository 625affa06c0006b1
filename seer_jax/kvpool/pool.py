"""What a KV pool is to its callers: blocks of KV by key, which may be gone at any time."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import numpy as np

from seer_jax.kvpool.keys import BlockKey


class Status(enum.Enum):
    """What became of one block of a batch. For everything but HIT a caller of `get_blocks` re-prefills from tokens."""

    HIT = "hit"
    """The buffer holds the block, its checksum was right."""
    STORED = "stored"
    """The pool holds the block; it may evict it later."""
    MISS = "miss"
    CORRUPT = "corrupt"
    """The bytes were damaged and the block is forgotten; or the buffer has another shape or type than the block."""
    TIMEOUT = "timeout"
    """The pool could not take or give the block in time."""
    NO_SPACE = "no_space"
    """The block does not fit, or everything stored is worth more."""


HOLDINGS = {"num_blocks", "dram_bytes", "peak_dram_bytes", "max_dram_bytes", "disk_bytes", "max_disk_bytes"}
"""Fields of `PoolStats` that count nothing up."""


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Counters since the pool was opened, and what it holds now.

    Attributes:
        num_blocks: Blocks that can be had now; 0 where the backend cannot tell.
        dram_bytes: Memory in use, of `max_dram_bytes`.
        peak_dram_bytes: The most that it has been.
        disk_bytes: Size of the files, dead blocks included, of `max_disk_bytes`.
        num_stored: Blocks newly stored; a key put again does not count.
        num_hits: Blocks returned.
        num_misses: Blocks asked for that were not there.
        num_corrupt: Blocks found damaged, or asked for with another shape or type.
        num_evicted: Blocks thrown out for others, or lost to a disk that would not take them.
        num_refused: Puts that ended in NO_SPACE.
        num_timeouts: Blocks whose put or get ended in TIMEOUT.
        num_unasked: Blocks that were answered MISS or NO_SPACE at once, because the backend's server was not answering.
        num_spilled: Blocks written to disk, moves between files included.
        spilled_bytes: Bytes of these, headers included.
        num_disk_errors: Reads and writes that the file system refused.
        num_recovered: Blocks found on disk when the pool was opened.
        truncated_bytes: Bytes on disk that were cut off then, being no valid block or behind one that is not.
        num_owners_lost: Owners of a shared pool that died with what they held.
        put_wait_s: Time puts spent waiting for memory, all threads together.
    """

    num_blocks: int = 0
    dram_bytes: int = 0
    peak_dram_bytes: int = 0
    max_dram_bytes: int = 0
    disk_bytes: int = 0
    max_disk_bytes: int = 0
    num_stored: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_corrupt: int = 0
    num_evicted: int = 0
    num_refused: int = 0
    num_timeouts: int = 0
    num_unasked: int = 0
    num_spilled: int = 0
    spilled_bytes: int = 0
    num_disk_errors: int = 0
    num_recovered: int = 0
    truncated_bytes: int = 0
    num_owners_lost: int = 0
    put_wait_s: float = 0.0

    def since(self, before: "PoolStats") -> "PoolStats":
        """These figures with the counters from `before` on; what the pool holds stays as it is."""
        names = {field.name for field in fields(self)} - HOLDINGS
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in names})


@runtime_checkable
class KVPool(Protocol):
    """Blocks of KV by key. Batch first; buffers are the caller's; a miss is a status, never an exception.

    A key names its content: a key put again keeps the bytes that are there. All methods may be called from any thread.
    There are no pins: a chunk that arrives has its KV fetched at once, so nothing waits in the pool that is known to be
    needed; and pins of an instance that died would never be taken back.
    """

    @property
    def is_shared(self) -> bool:
        """Whether other instances find what this one put, also when it is dead."""
        ...

    def put_blocks(
        self, keys: Sequence[BlockKey], buffers: Sequence[np.ndarray], *, priority: float = 0.0
    ) -> list[Status]:
        """Copy blocks into the pool; the buffers are free again afterwards.

        Args:
            keys: One per block.
            buffers: C-contiguous arrays of a plain type, at most 8 dimensions; not written.
            priority: What is lowest is evicted first; a key put again keeps its highest.

        Returns:
            STORED, NO_SPACE or TIMEOUT for each.

        Raises:
            ValueError: If a buffer is not as described, or there are more keys than buffers or the reverse.
        """
        ...

    def get_blocks(self, keys: Sequence[BlockKey], outs: Sequence[np.ndarray]) -> list[Status]:
        """Copy blocks out of the pool.

        Args:
            keys: One per block.
            outs: Writable C-contiguous arrays of the blocks' shapes and types. Where the status is not HIT, the
                content is undefined afterwards.

        Returns:
            HIT, MISS, CORRUPT or TIMEOUT for each.

        Raises:
            ValueError: As `put_blocks`.
        """
        ...

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Whether each block could be had now; does not count as use."""
        ...

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Forget these blocks; what is not there is no error."""
        ...

    def drop_epochs_before(self, epoch: int) -> int:
        """Forget all blocks of weights older than `epoch`; returns how many there were."""
        ...

    def stats(self) -> PoolStats:
        """Counters and sizes now."""
        ...

    def close(self) -> None:
        """Give memory and files back. A closed pool is empty and refuses every put."""
        ...
