"""KV of paused requests that leaves its pages: to the pool, to other instances, and back.

A pool that is this engine's own gets KV only when others need the pages, and gives it up when the request has it back.
One that instances share gets what is new at the end of each chunk and keeps it until the request ends, so that another
instance can go on when this one dies. Copies run on the device's own queue and on threads beside the engine's, which
waits only for what it needs now.
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
from seer_jax.core.kv.rank_pages import ParkedKV
from seer_jax.core.move_cost import MoveCosts
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestChunk, RequestId
from seer_jax.engine.kv_blocks import BlockLayout
from seer_jax.engine.kv_transfer import HostKV, KVTransfer
from seer_jax.kvpool import BlockKey, KVPool, PoolStats, Status

MAX_SAVES = 4
"""Exports on their way to the pool at most, since each of them holds memory of its own."""


@dataclass(eq=False)
class Saved:
    """One request's KV in the pool, or on its way there or back.

    Attributes:
        keys: All blocks in order of position; the last may be a partial one.
        num_tokens: Tokens that they cover.
        policy_version: Weights that computed them.
        put: How many of the first blocks the pool has.
        fetch: What came back.
        declined: Whether nothing is to come back, because computing it again is faster.
        first_fetched: The first block of `fetch`; siblings had those before it here when it began.
    """

    keys: list[BlockKey]
    num_tokens: int
    policy_version: int
    put: Future[int]
    fetch: Future[HostKV | None] | None = None
    declined: bool = False
    first_fetched: int = 0


class PausedKV:
    """Moves the KV of paused requests; belongs to one engine and is called between its steps.

    What is lost or damaged on the way costs a re-prefill, never a wrong token.

    Attributes:
        costs: Decides whether KV comes from the pool or is computed again.
        wait_s: Time that the engine waited for KV, since `clear`.
        num_saved_bytes: KV sent to the pool, since `clear`.
    """

    def __init__(
        self,
        planner: BatchPlanner,
        transfer: KVTransfer,
        pool: KVPool,
        layout: BlockLayout,
        chaos: ChaosConfig,
        *,
        always_moves: bool,
    ) -> None:
        """Start with nothing saved.

        Args:
            planner: The engine's.
            transfer: The engine's.
            pool: Closed by `close`.
            layout: Of the engine's KV.
            chaos: Faults.
            always_moves: See `MoveCosts`.
        """
        self.wait_s, self.num_saved_bytes = 0.0, 0
        self.costs = MoveCosts(planner.max_prefill_tokens, always_moves=always_moves)
        self._planner, self._transfer, self._pool, self._layout = planner, transfer, pool, layout
        # Apart, since a put may wait for the pool's disk, and the engine for what is fetched.
        self._putting, self._fetching = (ThreadPoolExecutor(1, f"kv-{name}") for name in ("put", "fetch"))
        self._saved: dict[RequestId, Saved] = {}
        self._chaos = chaos
        self._begin_to_count()

    def save_evicted(self, caches: list[jax.Array], policy_version: int) -> None:
        """Send KV whose pages were given away to the pool; call it before they are written again."""
        for request_id, parked in self._planner.evicted:
            unfinished = self._unfinished_puts()
            if len(unfinished) >= MAX_SAVES:
                self._wait(unfinished[0])
            self._save(request_id, parked, caches, policy_version)
        self._planner.evicted.clear()

    def keep(self, request_id: RequestId, caches: list[jax.Array], policy_version: int) -> None:
        """Send what is new in the KV of a request that was just parked to a shared pool, unless that is busy.

        What is left out is sent with the next chunk's, or when the pages are given away.
        """
        if not self._pool.is_shared:
            self.drop(request_id)
        elif len(self._unfinished_puts()) < MAX_SAVES:
            self._save(request_id, self._planner.parked[request_id], caches, policy_version)

    def arrive(self, chunk: RequestChunk) -> None:
        """Begin to bring the KV of a chunk back from the pool, while it waits for a slot."""
        handle, request_id = chunk.kv, chunk.request_id
        if handle is None or request_id in self._planner.parked:
            return
        if self._pool.is_shared:
            known = self._saved.get(request_id)
            if known is None or known.num_tokens < handle.num_tokens:
                keys = self._layout.keys(request_id, chunk.token_ids[: handle.num_tokens], handle.policy_version)
                num_held = handle.ref.num_saved_blocks if isinstance(handle.ref, HostKV) else len(keys)
                self._saved[request_id] = Saved(keys, handle.num_tokens, handle.policy_version, _done(num_held))
        if not isinstance(handle.ref, HostKV):
            self._begin_fetch(request_id, self._planner.num_present(chunk))

    def begin_take(
        self, request_id: RequestId, caches: list[jax.Array], policy_version: int
    ) -> Callable[[], HostKV | None]:
        """Give a request's KV up, from its pages or from a pool that only this engine has.

        Returns:
            What to call for it, from any thread; it waits for copies under way and gives None if the KV is gone, or in
            a shared pool.
        """
        parked, saved = self._planner.unpark(request_id), self._saved.get(request_id)
        if parked is None and not self._pool.is_shared:
            fetch = self._take_fetch(request_id, 0)
            return (lambda: None) if fetch is None else fetch.result
        self._saved.pop(request_id, None)
        export = None if parked is None else self._transfer.export_pages(caches, parked.pages)
        num_full = len(saved.keys) if saved is not None else 0
        if saved is not None and parked is not None and saved.num_tokens < len(parked.token_ids):
            # The pool was busy at the end of the last chunk. A partial block of the one before is of no more use.
            partial = [key for key in saved.keys if key.num_tokens < self._layout.block_tokens]
            num_full -= len(partial)
            self._putting.submit(self._pool.drop, partial)

        def wait() -> HostKV | None:
            num_saved = 0 if saved is None else min(num_full, saved.put.result())
            if parked is None:
                return None
            return HostKV(
                pages=np.asarray(export)[: len(parked.pages)],
                num_tokens=len(parked.token_ids),
                policy_version=policy_version,
                num_saved_blocks=num_saved,
            )

        return wait

    def bring(self, sequence: Sequence, caches: list[jax.Array], policy_version: int) -> list[jax.Array]:
        """Bring in the KV of a resumed chunk that was just admitted, unless it is in its pages already.

        Returns:
            The caches; the donated ones are gone.
        """
        handle, num_present = sequence.chunk.kv, sequence.num_computed
        if handle is None or num_present >= min(handle.num_tokens, sequence.num_tokens - 1):
            return caches
        kv = handle.ref
        if not isinstance(kv, HostKV):
            fetch = self._take_fetch(sequence.chunk.request_id, num_present)
            kv = None if fetch is None else self._wait(fetch)
        if kv is None or kv.policy_version != policy_version or kv.num_tokens <= num_present:
            return caches
        try:
            # Siblings read the pages of the prompt that are there already.
            first, end = num_present // self._planner.info.page_size, self._planner.pages_for(kv.num_tokens)
            data = kv.pages[first - kv.first_page :]
            caches = self._transfer.import_pages(caches, sequence.pages[first:end], data)
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

    def clear(self, policy_version: int) -> None:
        """Forget all KV, since every request has ended, and begin to count anew."""
        for request_id in list(self._saved):
            self.drop(request_id)
        self._putting.submit(self._pool.drop_epochs_before, policy_version)
        for thread in (self._putting, self._fetching):
            thread.submit(int).result()  # Whatever was on its way has arrived.
        self._begin_to_count()

    def figures(self) -> dict[str, int | float]:
        """Fields of `InstanceStatus`, counted from `clear` on; of a shared pool only what this instance saw."""
        pool = PoolStats(num_corrupt=self._num_corrupt, num_refused=self._num_refused)
        if self._before is not None:
            pool = self._pool.stats().since(self._before)
        return {
            "num_corrupt_blocks": pool.num_corrupt,
            "num_lost_blocks": pool.num_evicted + pool.num_refused + pool.num_timeouts,
            "num_spilled_bytes": pool.spilled_bytes,
            "pool_peak_bytes": pool.peak_dram_bytes,
            "num_saved_bytes": self.num_saved_bytes,
            "num_declined_moves": self.costs.num_declined,
            "kv_wait_s": self.wait_s,
        }

    def close(self) -> None:
        """Stop the threads and close the pool."""
        self._fetching.shutdown()
        self._putting.shutdown()
        self._pool.close()

    def _begin_to_count(self) -> None:
        self.wait_s, self.num_saved_bytes, self.costs.num_declined = 0.0, 0, 0
        self._num_corrupt = self._num_refused = 0
        self._num_to_corrupt = self._chaos.corrupt_block
        self._before = None if self._pool.is_shared else self._pool.stats()

    def _unfinished_puts(self) -> list[Future[int]]:
        return [saved.put for saved in self._saved.values() if not saved.put.done()]

    def _save(self, request_id: RequestId, parked: ParkedKV, caches: list[jax.Array], policy_version: int) -> None:
        """Send the blocks that the pool does not have yet, and let it drop the partial one that another replaces."""
        keys = self._layout.keys(request_id, parked.token_ids, policy_version)
        old, first = self._saved.get(request_id), 0
        if old is not None:
            num_held = old.put.result() if old.put.done() else len(old.keys)
            first = next((i for i, key in enumerate(keys) if i >= num_held or key != old.keys[i]), len(keys))
        if first == len(keys):
            return
        replaced = [] if old is None else [key for key in old.keys if key not in keys]
        pages = parked.pages[first * self._layout.pages_per_block :]
        export = self._transfer.export_pages(caches, pages)
        # What the scheduler runs first is kept longest; then no block is kept longer than those it is useless without.
        priority = -parked.priority - first * self._layout.block_tokens / self._planner.info.max_model_len
        put = self._putting.submit(self._put, keys, first, export, len(pages), priority)
        if replaced:
            self._putting.submit(self._pool.drop, replaced)
        self._saved[request_id] = Saved(keys, len(parked.token_ids), policy_version, put)

    def _put(self, keys: list[BlockKey], first: int, export: jax.Array, num_pages: int, priority: float) -> int:
        """Put the blocks from the first exported one on; returns how many of the first the pool has then."""
        pages = np.asarray(export)[:num_pages]
        # A pool that evicts, or whose owner died, has less than it was given; the next save sends it again.
        held = self._pool.contains(keys[:first]) if first else []
        # From the back, so that the first blocks count as used last.
        blocks = self._layout.cut(pages)
        statuses = self._pool.put_blocks(keys[first:][::-1], blocks[::-1], priority=priority)[::-1]
        held += [status is Status.STORED for status in statuses]
        self.num_saved_bytes += pages.nbytes
        self._num_refused += len(statuses) - statuses.count(Status.STORED)
        if self._num_to_corrupt and self._pool.flip_bit(keys[first]):
            self._num_to_corrupt -= 1
        return held.index(False) if False in held else len(keys)

    def _begin_fetch(self, request_id: RequestId, num_present: int) -> Future[HostKV | None] | None:
        """Start to get a request's KV out of the pool if that is worth it; None if nothing is there.

        What siblings have here, `num_present` leading tokens, is left out; begun anew if less is here than before.
        """
        saved = self._saved.get(request_id)
        if saved is None:
            return None
        first = num_present // self._layout.block_tokens
        if saved.fetch is None or first < saved.first_fetched:
            num_pages = self._planner.pages_for(saved.num_tokens) - first * self._layout.pages_per_block
            num_tokens, num_bytes = saved.num_tokens - num_present, num_pages * self._layout.page_bytes
            was_declined = saved.fetch is not None and saved.declined
            pays = self.costs.moving_pays(num_tokens, num_bytes, was_declined=was_declined)
            saved.first_fetched, saved.declined = first, not pays
            saved.fetch = self._fetching.submit(self._fetch, saved, first, num_pages) if pays else _done(None)
        return saved.fetch

    def _take_fetch(self, request_id: RequestId, num_present: int) -> Future[HostKV | None] | None:
        """`_begin_fetch`, for one who takes what comes; a pool of one's own drops it."""
        fetch = self._begin_fetch(request_id, num_present)
        if fetch is not None:
            self._saved[request_id].fetch = None
            if not self._pool.is_shared:
                keys = self._saved.pop(request_id).keys
                fetch.add_done_callback(lambda _: self._putting.submit(self._pool.drop, keys))
        return fetch

    def _fetch(self, saved: Saved, first: int, num_pages: int) -> HostKV | None:
        """Get blocks from a first one, where `num_pages` pages begin, up to the first one that is gone."""
        num_held, layout = saved.put.result(), self._layout
        pages = np.empty((num_pages, *layout.page_shape), layout.dtype)
        started = time.perf_counter()
        statuses = self._pool.get_blocks(saved.keys[first:], layout.cut(pages))
        self._num_corrupt += statuses.count(Status.CORRUPT)
        num_hits = next((i for i, status in enumerate(statuses) if status is not Status.HIT), len(statuses))
        if num_hits == len(statuses):
            self.costs.move.note(pages.nbytes, time.perf_counter() - started)
        else:
            saved.put = _done(min(num_held, first + num_hits))
        if not num_hits:
            return None
        num_tokens = min(saved.num_tokens, (first + num_hits) * layout.block_tokens)
        first_page = first * layout.pages_per_block
        pages = pages[: self._planner.pages_for(num_tokens) - first_page]
        return HostKV(pages=pages, num_tokens=num_tokens, policy_version=saved.policy_version, first_page=first_page)

    def _wait(self, future: Future) -> Any:
        started = time.perf_counter()
        value = future.result()
        self.wait_s += time.perf_counter() - started
        return value


def _done(value: Any) -> Future:
    """A future that has come."""
    future: Future = Future()
    future.set_result(value)
    return future
