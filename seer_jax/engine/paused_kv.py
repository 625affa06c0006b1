"""KV of paused requests that leaves its pages: to the pool, to other instances, and back.

Copies run on the device's own queue and on threads beside the engine's, which waits only for what it needs now.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from seer_jax.config.schema import ChaosConfig
from seer_jax.core.batching import BatchPlanner
from seer_jax.core.errors import TransferError
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestId
from seer_jax.engine.kv_transfer import HostKV, KVTransfer
from seer_jax.kvpool import BlockKey, KVPool, PoolStats, Status, block_key, chain_keys

BLOCK_BYTES = 16 << 20
"""Size of the pool's blocks at most, unless a single page is larger: large enough to cost no time but the copy's."""
MAX_SAVES = 4
"""Exports on their way to the pool at most, since each of them holds memory of its own; one more waits."""


@dataclass(eq=False)
class Saved:
    """One request's KV in the pool, or on its way there or back."""

    keys: list[BlockKey]
    num_tokens: int
    policy_version: int
    put: Future[tuple[tuple[int, ...], np.dtype]]
    fetch: Future[HostKV | None] | None = None


class PausedKV:
    """Moves the KV of paused requests; belongs to one engine and is called between its steps.

    What is lost or damaged on the way costs a re-prefill, never a wrong token.

    Attributes:
        wait_s: Time that the engine waited for KV, since `clear`.
    """

    def __init__(
        self, planner: BatchPlanner, transfer: KVTransfer, pool: KVPool, layout: bytes, chaos: ChaosConfig
    ) -> None:
        """Start with nothing saved.

        Args:
            planner: The engine's.
            transfer: The engine's.
            pool: Becomes this object's own.
            layout: Fingerprint of model, type and cache shape.
            chaos: Faults.
        """
        self.wait_s = 0.0
        self._planner, self._transfer, self._pool, self._layout = planner, transfer, pool, layout
        # Apart, since a put may wait for the pool's disk, and the engine for what is fetched.
        self._putting, self._fetching = (ThreadPoolExecutor(1, f"kv-{name}") for name in ("put", "fetch"))
        self._saved: dict[RequestId, Saved] = {}
        self._chaos, self._num_to_corrupt = chaos, chaos.corrupt_block
        self._before = pool.stats()

    def save_evicted(self, caches: list[jax.Array], policy_version: int) -> None:
        """Send KV whose pages were given away to the pool; call it before they are written again."""
        for request_id, parked in self._planner.evicted:
            unfinished = [saved.put for saved in self._saved.values() if not saved.put.done()]
            if len(unfinished) >= MAX_SAVES:
                self._wait(unfinished[0])
            self.drop(request_id)
            export = self._transfer.export_pages(caches, parked.pages)
            # Its own block, even where a sibling has said the same: it is dropped when this request has it back.
            owner = f"{request_id.group_id}/{request_id.index}".encode()
            names = {"epoch": policy_version, "layout": self._layout + owner}
            block_tokens = _pages_per_block(export) * self._planner.pool.page_size
            keys = chain_keys(parked.token_ids, block_tokens, **names)
            rest = parked.token_ids[len(keys) * block_tokens :]
            if len(rest):
                keys.append(block_key(keys[-1] if keys else None, rest, **names))
            put = self._putting.submit(self._put, keys, export, len(parked.pages))
            self._saved[request_id] = Saved(keys, len(parked.token_ids), policy_version, put)
        self._planner.evicted.clear()

    def prefetch(self, request_id: RequestId) -> None:
        """Start to bring a request's KV back from the pool, while its next chunk waits for a slot."""
        saved = self._saved.get(request_id)
        if saved is not None and saved.fetch is None:
            saved.fetch = self._fetching.submit(self._fetch, saved)

    def begin_take(
        self, request_id: RequestId, caches: list[jax.Array], policy_version: int
    ) -> Callable[[], HostKV | None]:
        """Give a request's KV up, from its pages or from the pool.

        Returns:
            What to call for it, from any thread; it waits for copies under way and gives None if the KV is gone.
        """
        parked = self._planner.unpark(request_id)
        if parked is None:
            fetch = self._take_saved(request_id)
            return (lambda: None) if fetch is None else fetch.result
        export, num_pages = self._transfer.export_pages(caches, parked.pages), len(parked.pages)
        return lambda: HostKV(
            pages=np.asarray(export)[:num_pages], num_tokens=len(parked.token_ids), policy_version=policy_version
        )

    def bring(self, sequence: Sequence, caches: list[jax.Array], policy_version: int) -> list[jax.Array]:
        """Bring in the KV of a resumed chunk that was just admitted, unless it is in its pages already.

        Returns:
            The caches; the donated ones are gone.
        """
        handle, num_present = sequence.chunk.kv, sequence.num_computed
        if handle is None or num_present >= min(handle.num_tokens, sequence.num_tokens - 1):
            return caches
        saved = self._take_saved(sequence.chunk.request_id)
        kv = handle.ref if isinstance(handle.ref, HostKV) or saved is None else self._wait(saved)
        if not isinstance(kv, HostKV) or kv.policy_version != policy_version:
            return caches
        try:
            # Siblings read the pages of the prompt that are there already.
            first, end = num_present // self._planner.info.page_size, self._planner.pool.pages_for(kv.num_tokens)
            caches = self._transfer.import_pages(caches, sequence.pages[first:end], kv.pages[first:])
        except TransferError:
            return caches
        # Nobody else may hold the host's copy for as long as the chunk runs.
        sequence.chunk = replace(sequence.chunk, kv=replace(handle, ref=None))
        sequence.note_kv(kv.num_tokens)
        self._planner.num_imported_tokens += sequence.num_computed - num_present
        return caches

    def drop(self, request_id: RequestId) -> None:
        """Forget what the pool has of a request."""
        saved = self._saved.pop(request_id, None)
        if saved is not None:
            self._putting.submit(self._pool.drop, saved.keys)

    def clear(self) -> None:
        """Forget all KV in the pool and begin to count anew."""
        for request_id in list(self._saved):
            self.drop(request_id)
        for thread in (self._putting, self._fetching):
            thread.submit(int).result()  # Whatever was on its way has arrived.
        self.wait_s, self._before = 0.0, self._pool.stats()
        self._num_to_corrupt = self._chaos.corrupt_block

    def stats(self) -> PoolStats:
        """The pool's, with the counters from `clear` on."""
        return self._pool.stats().since(self._before)

    def close(self) -> None:
        """Stop the threads and close the pool."""
        self._putting.shutdown()
        self._fetching.shutdown()
        self._pool.close()

    def _take_saved(self, request_id: RequestId) -> Future[HostKV | None] | None:
        self.prefetch(request_id)
        saved = self._saved.pop(request_id, None)
        return None if saved is None else saved.fetch

    def _wait(self, future: Future) -> Any:
        started = time.perf_counter()
        value = future.result()
        self.wait_s += time.perf_counter() - started
        return value

    def _put(self, keys: list[BlockKey], export: jax.Array, num_pages: int) -> tuple[tuple[int, ...], np.dtype]:
        pages = np.asarray(export)[:num_pages]
        self._pool.put_blocks(keys, _cut(pages))
        if self._num_to_corrupt and self._pool.flip_bit(keys[0]):
            self._num_to_corrupt -= 1
        return pages.shape, pages.dtype

    def _fetch(self, saved: Saved) -> HostKV | None:
        shape, dtype = saved.put.result()
        pages = np.empty(shape, dtype)
        statuses = self._pool.get_blocks(saved.keys, _cut(pages))
        self._pool.drop(saved.keys)
        if any(status is not Status.HIT for status in statuses):
            return None
        return HostKV(pages=pages, num_tokens=saved.num_tokens, policy_version=saved.policy_version)


def _pages_per_block(pages: jax.Array | np.ndarray) -> int:
    return max(1, BLOCK_BYTES * len(pages) // pages.nbytes)


def _cut(pages: np.ndarray) -> list[np.ndarray]:
    """Views of the pages of each block."""
    each = _pages_per_block(pages)
    return [pages[start : start + each] for start in range(0, len(pages), each)]
