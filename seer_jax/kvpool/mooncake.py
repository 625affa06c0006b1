"""A pool in Mooncake's distributed store: memory that several processes and machines lend to all of them.

Mooncake (arXiv 2407.00079; package `mooncake-transfer-engine`) is a cache: what it took it may evict at once and
without a word, its calls block for seconds when its master is dead, and it checks no bytes. So here every call has a
deadline, a master that does not answer is left alone until a probe succeeds, and every block carries our header and
checksum.
"""

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.kvpool.blocks import HEADER_BYTES, bytes_to_fill, bytes_to_put
from seer_jax.kvpool.breaker import CircuitBreaker
from seer_jax.kvpool.frames import Frame, batches, views
from seer_jax.kvpool.keys import BlockKey
from seer_jax.kvpool.lanes import Lane, Lanes
from seer_jax.kvpool.mooncake_client import (
    INVALID_PARAMS,
    NO_AVAILABLE_HANDLE,
    RPC_FAIL,
    check_settings,
    connect,
    epoch_name,
    less_than,
)
from seer_jax.kvpool.pool import PoolStats, Status

NUM_LANES = 2
"""Calls on their way at a time."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between a master's silence and probes of it."""

_ABANDONED: list[object] = []
"""Clients that could not be closed; to collect one would close it, and block all threads if its master hangs."""


class MooncakeKVPool:
    """A `KVPool` of one `mooncake_master` and the segments that its clients lend it, over TCP.

    Priorities order nothing: Mooncake evicts by last use. `stats` cannot tell how many blocks there are. A put returns
    when the bytes are in some client's segment; they are lost when that client or the master ends.

    Bytes go through registered buffers of the pool, never straight to or from the caller's: a call that overran its
    deadline may still be writing. The one copy that this costs is made while the checksum is taken.
    """

    is_shared = True

    def __init__(
        self,
        master: str,
        *,
        namespace: str,
        segment_bytes: int,
        buffer_bytes: int = 64 << 20,
        timeout_s: float = 2.0,
    ) -> None:
        """Connect, and lend memory.

        Args:
            master: `host:port` of `mooncake_master`.
            namespace: Name of the run. Keys say which epoch of the weights, not of which run: two runs with one
                namespace and one master would read each other's KV.
            segment_bytes: Memory lent to the pool; 0 = only use what others lend.
            buffer_bytes: Size of each of the `NUM_LANES` buffers; a block that is larger, less its header, is refused.
            timeout_s: Longest that a batch, or the part of it that fills a buffer, waits.

        Raises:
            ConfigError: If a value makes no sense, the package or its libraries are missing, or no master is there.
        """
        check_settings(namespace, segment_bytes, buffer_bytes, timeout_s)
        self._namespace, self._segment_bytes, self._timeout_s = namespace, segment_bytes, timeout_s
        self._store = connect(master, segment_bytes=segment_bytes, timeout_s=timeout_s)
        self._lanes = Lanes(NUM_LANES, buffer_bytes)
        for buffer in self._lanes.buffers:
            if self._store.register_buffer(buffer.ctypes.data, buffer.nbytes):
                raise ConfigError("MooncakeKVPool.buffer_bytes", f"mooncake cannot register {buffer.nbytes} bytes")
        self._buffer_bytes = buffer_bytes
        self._breaker = CircuitBreaker(first_wait_s=FIRST_WAIT_S, longest_wait_s=LONGEST_WAIT_S)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._closed = False

    def put_blocks(
        self, keys: Sequence[BlockKey], buffers: Sequence[np.ndarray], *, priority: float = 0.0
    ) -> list[Status]:
        """See `KVPool`. The priority is ignored."""
        frames = self._frames(keys, buffers, bytes_to_put(keys, buffers, priority))
        first: dict[bytes, Frame] = {}
        for frame in frames:
            first.setdefault(frame.key.digest, frame)
        fitting = [frame for frame in first.values() if frame.size <= self._buffer_bytes]
        statuses = dict.fromkeys(first, Status.NO_SPACE)
        for batch in batches(fitting, self._buffer_bytes):
            found = self._on_lane(self._put_batch, batch, unasked=Status.NO_SPACE)
            statuses |= {frame.key.digest: status for frame, status in zip(batch, found, strict=True)}
        results = [statuses[key.digest] for key in keys]
        self._count(num_refused=results.count(Status.NO_SPACE), num_timeouts=results.count(Status.TIMEOUT))
        return results

    def get_blocks(self, keys: Sequence[BlockKey], outs: Sequence[np.ndarray]) -> list[Status]:
        """See `KVPool`."""
        frames = self._frames(keys, outs, bytes_to_fill(keys, outs))
        results: list[Status] = []
        for batch in batches(frames, self._buffer_bytes):
            results += self._on_lane(self._get_batch, batch, unasked=Status.MISS)
        self._count(
            num_hits=results.count(Status.HIT),
            num_misses=results.count(Status.MISS),
            num_corrupt=results.count(Status.CORRUPT),
            num_timeouts=results.count(Status.TIMEOUT),
        )
        return results

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `KVPool`."""
        codes = self._ask(self._store.batch_is_exist, [self._name(key) for key in keys], otherwise=[0] * len(keys))
        return [code == 1 for code in codes]

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """See `KVPool`. While the master does not answer, nothing is dropped."""
        self._ask(self._store.batch_remove, [self._name(key) for key in keys], True, otherwise=[])

    def drop_epochs_before(self, epoch: int) -> int:
        """See `KVPool`; for all clients of this namespace. The master looks through its keys, no list is sent.

        What it cannot drop, not answering, is never asked for again and evicted in time.
        """
        if epoch <= 0:
            return 0
        pattern = f"^{self._namespace}/(?:{less_than(epoch)})/.*"
        return max(0, self._ask(self._store.remove_by_regex, pattern, True, otherwise=0))

    def stats(self) -> PoolStats:
        """See `KVPool`. Memory is what this client lends; how much of it is in use is not known."""
        with self._lock:
            max_dram_bytes = 0 if self._closed else self._segment_bytes
            return PoolStats(max_dram_bytes=max_dram_bytes, **self._counts)

    def close(self) -> None:
        """See `KVPool`. Blocks in this client's segment are lost to all.

        Mooncake holds Python's lock for one to three seconds meanwhile. If its master does not answer, it is not
        closed at all: its memory is the system's again when the process ends.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        answers = not self._breaker.is_open and self._probe()
        if self._lanes.close(self._timeout_s) and answers:
            self._store.close()
        else:
            _ABANDONED.append((self._store, self._lanes))

    def flip_bit(self, key: BlockKey, bit: int = 0) -> bool:
        """Damage a stored block, for tests and for chaos on purpose; False if it is not there."""
        name = self._name(key)
        if not self._may_ask():
            return False
        try:
            with self._lanes.take(self._timeout_s) as lane:
                address = lane.buffer.ctypes.data
                size = lane.call(self._store.get_into, name, address, len(lane.buffer))
                if size < HEADER_BYTES:
                    return False
                lane.buffer[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
                return lane.call(self._store.upsert_from, name, address, size) == 0
        except TimeoutError:
            return False

    def _name(self, key: BlockKey) -> str:
        return f"{self._namespace}/{epoch_name(key.epoch)}/{key.digest.hex()}"

    def _frames(
        self, keys: Sequence[BlockKey], arrays: Sequence[np.ndarray], flats: Sequence[np.ndarray]
    ) -> list[Frame]:
        return [Frame(key, self._name(key), array, flat) for key, array, flat in zip(keys, arrays, flats, strict=True)]

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def _may_ask(self) -> bool:
        if self._closed:
            return False
        if self._breaker.begin_probe():
            threading.Thread(target=self._probe_and_report, name="kvpool-probe", daemon=True).start()
        return not self._breaker.is_open

    def _on_lane(
        self, work: Callable[[Lane, list[Frame]], list[Status]], batch: list[Frame], *, unasked: Status
    ) -> list[Status]:
        if not self._may_ask():
            self._count(num_unasked=len(batch))
            return [unasked] * len(batch)
        try:
            with self._lanes.take(self._timeout_s) as lane:
                return work(lane, batch)
        except TimeoutError:
            self._breaker.trip()
            return [Status.TIMEOUT] * len(batch)

    def _ask(self, function: Callable, *args: object, otherwise: Any) -> Any:
        """Call the store; `otherwise` if it does not answer, or lately did not."""
        if not self._may_ask():
            return otherwise
        try:
            with self._lanes.take(self._timeout_s) as lane:
                return self._heard(lane.call(function, *args))
        except TimeoutError:
            self._breaker.trip()
            return otherwise

    def _heard(self, codes: Any) -> Any:
        """What the store answered; that it could not reach the master counts like a call that overran."""
        if codes == RPC_FAIL or (isinstance(codes, list) and RPC_FAIL in codes):
            self._breaker.trip()
        return codes

    def _put_batch(self, lane: Lane, batch: list[Frame]) -> list[Status]:
        held = self._heard(lane.call(self._store.batch_is_exist, [frame.name for frame in batch]))
        codes = {frame.name: code for frame, code in zip(batch, held, strict=True)}
        new = [frame for frame in batch if codes[frame.name] == 0]
        if new:
            memory = views(new, lane.buffer)
            for frame, view in zip(new, memory, strict=True):
                frame.write(view)
            names = [frame.name for frame in new]
            stored = self._heard(lane.call(self._store.batch_put_from, names, *_places(memory)))
            codes |= dict(zip(names, stored, strict=True))
            self._count(num_stored=stored.count(0))
        by_code = {0: Status.STORED, 1: Status.STORED, RPC_FAIL: Status.TIMEOUT}
        return [by_code.get(codes[frame.name], Status.NO_SPACE) for frame in batch]

    def _get_batch(self, lane: Lane, batch: list[Frame]) -> list[Status]:
        if batch[0].size > self._buffer_bytes:
            return [Status.MISS]
        statuses, damaged = self._read_batch(lane, batch)
        if damaged:
            # A block that is dropped while it is read comes out wrong too, but not twice.
            suspects = [batch[index] for index in damaged]
            again, still = self._read_batch(lane, suspects)
            for index, status in zip(damaged, again, strict=True):
                statuses[index] = status
            if still:
                names = [suspects[index].name for index in still]
                self._heard(lane.call(self._store.batch_remove, names, True))
        return statuses

    def _read_batch(self, lane: Lane, batch: list[Frame]) -> tuple[list[Status], list[int]]:
        """Statuses, and the indices of those frames whose stored bytes are damaged."""
        memory = views(batch, lane.buffer)
        codes = self._heard(lane.call(self._store.batch_get_into, [frame.name for frame in batch], *_places(memory)))
        # A block that is too long for its frame is another array's.
        by_code = {INVALID_PARAMS: Status.CORRUPT, RPC_FAIL: Status.TIMEOUT}
        statuses, damaged = [], []
        for index, (frame, view, code) in enumerate(zip(batch, memory, codes, strict=True)):
            status, is_sound = frame.read(view[:code]) if code >= 0 else (by_code.get(code, Status.MISS), True)
            statuses.append(status)
            if not is_sound:
                damaged.append(index)
        return statuses, damaged

    def _probe_and_report(self) -> None:
        succeeded = False
        try:
            succeeded = self._probe()
        finally:
            self._breaker.end_probe(succeeded)

    def _probe(self) -> bool:
        """Whether the master answers, and bytes put into the store come back; a store that is full is alive too."""
        name, nonce = f"{self._namespace}/probe/{secrets.token_hex(8)}", secrets.token_bytes(16)
        try:
            with self._lanes.take(self._timeout_s) as lane:
                address = lane.buffer.ctypes.data
                lane.buffer[:16] = np.frombuffer(nonce, np.uint8)
                code = lane.call(self._store.put_from, name, address, 16)
                if code:
                    return code == NO_AVAILABLE_HANDLE
                found = lane.call(self._store.get_into, name, address + 16, 16)
                is_same = found == 16 and lane.buffer[16:32].tobytes() == nonce
                return is_same and lane.call(self._store.remove, name, True) == 0
        except TimeoutError:
            return False


def _places(memory: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Addresses and sizes."""
    return [view.ctypes.data for view in memory], [len(view) for view in memory]
