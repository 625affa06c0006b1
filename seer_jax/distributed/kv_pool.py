"""A KV pool that the instances of all nodes share: an owner per node, and a directory of who has what.

An instance talks to its own node's owner first. Bytes travel as arguments and results of calls: Ray copies them into
the node's object store once, and the other side reads them there in place. Every call has a deadline. An owner that is
dead or silent costs its blocks, which are misses, and raises nothing.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from seer_jax.core.errors import SeerError
from seer_jax.kvpool import BlockKey, EmbeddedKVPool, PoolStats, Status
from seer_jax.kvpool.blocks import bytes_to_fill, bytes_to_put

CALL_TIMEOUT_S = 20.0
"""Longer than an owner's put waits for memory (`EmbeddedKVPool`)."""
RETRY_S = 10.0
"""An owner that did not answer in time is not asked again for so long: whoever waits for it would wait each time."""
BATCH_BYTES = 64 << 20
"""Blocks of a call at most, unless one is larger: they are in the object store for as long as it takes."""
MAX_CONCURRENCY = 16
"""Calls that may be under way at an owner; one of them is `watch`."""


class BlockType(NamedTuple):
    """What a block's bytes are an array of."""

    dtype: np.dtype
    shape: tuple[int, ...]


class PoolOwner:
    """An `EmbeddedKVPool` in a process of its own; `PoolOwners` makes it an actor, whose calls run on threads."""

    def __init__(self, make: Callable[[], EmbeddedKVPool]) -> None:
        """Open the pool; if that fails there is none, and `check` says why."""
        self._error: SeerError | None = None
        try:
            self._pool = make()
        except SeerError as error:
            logging.warning("An owner of the KV pool holds nothing: %s", error)
            self._pool, self._error = EmbeddedKVPool(0), error

    def check(self) -> None:
        """Raise what the pool could not be opened for."""
        if self._error is not None:
            raise self._error

    def ping(self) -> None:
        """Answer: that it does says that the owner does not hang."""

    def watch(self) -> None:
        """Return never: that the call ends says that the owner is dead."""
        threading.Event().wait()

    def announce(self, node: str, directory: Any) -> None:
        """Tell a directory what is here."""
        directory.add.remote(node, self._pool.keys())

    def put_blocks(
        self, keys: Sequence[BlockKey], data: Sequence[np.ndarray], types: Sequence[BlockType], priority: float
    ) -> list[Status]:
        """See `KVPool`; `data` are the bytes."""
        buffers = [flat.view(kind.dtype).reshape(kind.shape) for flat, kind in zip(data, types, strict=True)]
        return self._pool.put_blocks(keys, buffers, priority=priority)

    def get_blocks(self, keys: Sequence[BlockKey], types: Sequence[BlockType]) -> tuple[list[Status], list[np.ndarray]]:
        """See `KVPool`; returns with the statuses the bytes of the hits, in order."""
        outs = [np.empty(kind.shape, kind.dtype) for kind in types]
        statuses = self._pool.get_blocks(keys, outs)
        hits = [out for out, status in zip(outs, statuses, strict=True) if status is Status.HIT]
        return statuses, [hit.reshape(-1).view(np.uint8) for hit in hits]

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `KVPool`."""
        return self._pool.contains(keys)

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """See `KVPool`."""
        self._pool.drop(keys)

    def drop_epochs_before(self, epoch: int) -> int:
        """See `KVPool`."""
        return self._pool.drop_epochs_before(epoch)

    def stats(self) -> PoolStats:
        """See `KVPool`."""
        return self._pool.stats()

    def flip_bit(self, key: BlockKey, bit: int) -> bool:
        """See `EmbeddedKVPool`."""
        return self._pool.flip_bit(key, bit)


class PoolDirectory:
    """Which nodes were given which blocks; what an owner has evicted since is still listed, and a miss there."""

    def __init__(self) -> None:
        self._nodes: dict[BlockKey, set[str]] = {}

    def ping(self) -> None:
        """See `PoolOwner`."""

    def watch(self) -> None:
        """See `PoolOwner`."""
        threading.Event().wait()

    def add(self, node: str, keys: Sequence[BlockKey]) -> None:
        """Note blocks of a node."""
        for key in keys:
            self._nodes.setdefault(key, set()).add(node)

    def find(self, keys: Sequence[BlockKey]) -> list[list[str]]:
        """The nodes of each block."""
        return [sorted(self._nodes.get(key, ())) for key in keys]

    def drop(self, keys: Sequence[BlockKey]) -> list[list[str]]:
        """`find`, and forget them."""
        return [sorted(self._nodes.pop(key, ())) for key in keys]

    def drop_epochs_before(self, epoch: int) -> None:
        """Forget blocks of older weights."""
        for key in [key for key in self._nodes if key.epoch < epoch]:
            del self._nodes[key]

    def forget(self, node: str) -> None:
        """An owner is dead."""
        for key, nodes in list(self._nodes.items()):
            nodes.discard(node)
            if not nodes:
                del self._nodes[key]


class RayKVPool:
    """The pool as one instance sees it; a `KVPool` once `connect` has named the owners."""

    is_shared = True

    def __init__(self, node: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Know no owner yet: every block is a miss.

        Args:
            node: Name of the node whose owner takes what is put here.
            timeout_s: Longest that a call of this object may wait for owners and directory together.
        """
        self._node, self._timeout_s = node, timeout_s
        self._owners: Mapping[str, Any] = {}
        self._directory: Any = None
        self._silent_until: dict[Any, float] = {}
        self._closed = False

    def connect(self, owners: Mapping[str, Any], directory: Any) -> None:
        """Use these owners, by node, and this directory from now on; a single owner needs no directory."""
        self._owners, self._directory, self._silent_until = owners, directory, {}

    def put_blocks(
        self, keys: Sequence[BlockKey], buffers: Sequence[np.ndarray], *, priority: float = 0.0
    ) -> list[Status]:
        """See `KVPool`. TIMEOUT also for a node without a living owner."""
        flats = bytes_to_put(keys, buffers, priority)
        if self._closed:
            return [Status.NO_SPACE] * len(keys)
        until = self._until()
        statuses: list[Status] = []
        for part in _batches(flats):
            types = [BlockType(buffer.dtype, buffer.shape) for buffer in buffers[part]]
            answer = self._call(until, self._node, "put_blocks", keys[part], flats[part], types, priority)
            statuses += [Status.TIMEOUT] * len(keys[part]) if isinstance(answer, Status) else answer
        if self._directory is not None:
            stored = [key for key, status in zip(keys, statuses, strict=True) if status is Status.STORED]
            self._ask(until, self._directory, "add", self._node, stored)
        return statuses

    def get_blocks(self, keys: Sequence[BlockKey], outs: Sequence[np.ndarray]) -> list[Status]:
        """See `KVPool`. TIMEOUT if an owner that should have a block does not answer, MISS if it is dead."""
        flats = bytes_to_fill(keys, outs)
        statuses, until = [Status.MISS] * len(keys), self._until()
        for node, wanted in self._places(until, keys):
            left = [i for i in wanted if statuses[i] is Status.MISS]
            for part in _batches([flats[i] for i in left]):
                asked = left[part]
                types = [BlockType(outs[i].dtype, outs[i].shape) for i in asked]
                answer = self._call(until, node, "get_blocks", [keys[i] for i in asked], types)
                found, hits = ([answer] * len(asked), ()) if isinstance(answer, Status) else answer
                arrays = iter(hits)
                for i, status in zip(asked, found, strict=True):
                    statuses[i] = status
                    if status is Status.HIT:
                        np.copyto(flats[i], next(arrays))
            if Status.MISS not in statuses:
                break
        return statuses

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `KVPool`."""
        held, until = [False] * len(keys), self._until()
        for node, wanted in self._places(until, keys):
            left = [i for i in wanted if not held[i]]
            answer = self._call(until, node, "contains", [keys[i] for i in left])
            if not isinstance(answer, Status):
                for i, here in zip(left, answer, strict=True):
                    held[i] = here
            if all(held):
                break
        return held

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """See `KVPool`."""
        nodes: dict[str, list[BlockKey]] = defaultdict(list)
        until = self._until()
        for key, others in zip(keys, self._ask_directory(until, "drop", keys), strict=True):
            for node in {self._node, *others}:
                nodes[node].append(key)
        for node, dropped in nodes.items():
            self._call(until, node, "drop", dropped)

    def drop_epochs_before(self, epoch: int) -> int:
        """See `KVPool`."""
        until = self._until()
        if self._directory is not None:
            self._ask(until, self._directory, "drop_epochs_before", epoch)
        answers = [self._call(until, node, "drop_epochs_before", epoch) for node in self._owners]
        return sum(answer for answer in answers if not isinstance(answer, Status))

    def stats(self) -> PoolStats:
        """See `KVPool`: the sum over all owners that answer."""
        until = self._until()
        answers = [self._call(until, node, "stats") for node in self._owners]
        return sum_stats([answer for answer in answers if isinstance(answer, PoolStats)])

    def close(self) -> None:
        """See `KVPool`. Ends this instance's use of the pool; the blocks stay for others."""
        self._closed = True

    def flip_bit(self, key: BlockKey, bit: int = 0) -> bool:
        """See `EmbeddedKVPool`."""
        return any(self._call(self._until(), node, "flip_bit", key, bit) is True for node in self._owners)

    def _until(self) -> float:
        return time.monotonic() + self._timeout_s

    def _places(self, until: float, keys: Sequence[BlockKey]) -> Iterator[tuple[str, list[int]]]:
        """The nodes to ask, this one first, with the indices of their keys; the directory is asked if need be."""
        if self._closed:
            return
        yield self._node, list(range(len(keys)))
        nodes: dict[str, list[int]] = defaultdict(list)
        for i, others in enumerate(self._ask_directory(until, "find", keys)):
            for node in others:
                nodes[node].append(i)
        nodes.pop(self._node, None)
        yield from nodes.items()

    def _ask_directory(self, until: float, method: str, keys: Sequence[BlockKey]) -> list[list[str]]:
        """The nodes that each block may be on; none if the directory is dead or silent."""
        answer = Status.MISS if self._directory is None else self._ask(until, self._directory, method, keys)
        return [[] for _ in keys] if isinstance(answer, Status) else answer

    def _call(self, until: float, node: str, method: str, *args: Any) -> Any:
        """Call a node's owner, if it has one; see `_ask`."""
        owner = self._owners.get(node)
        return Status.MISS if owner is None else self._ask(until, owner, method, *args)

    def _ask(self, until: float, actor: Any, method: str, *args: Any) -> Any:
        """Call an actor; returns its answer, or MISS if it is dead and TIMEOUT if it is silent."""
        left_s = until - time.monotonic()
        if left_s <= 0 or time.monotonic() < self._silent_until.get(actor, 0.0):
            return Status.TIMEOUT
        try:
            return ray.get(getattr(actor, method).remote(*args), timeout=left_s)
        except GetTimeoutError:
            logging.warning("The KV pool did not answer within %.1f s", left_s)
            self._silent_until[actor] = time.monotonic() + RETRY_S
            return Status.TIMEOUT
        except RayTaskError:
            raise  # A bug of ours, not a dead owner.
        except RayError as error:
            logging.warning("An owner of the KV pool is lost: %s", type(error).__name__)
            return Status.MISS


def sum_stats(parts: Sequence[PoolStats]) -> PoolStats:
    """Add the figures of several owners up."""
    return PoolStats(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(PoolStats)})


def _batches(flats: Sequence[np.ndarray]) -> list[slice]:
    """Cut a list of blocks so that no part has more than `BATCH_BYTES`, unless a single block does."""
    starts, size = [0] if flats else [], 0
    for i, flat in enumerate(flats):
        if size and size + len(flat) > BATCH_BYTES:
            starts.append(i)
            size = 0
        size += len(flat)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(flats)], strict=bool(flats))]
