"""One inference instance in its own process, on its own devices.

A thread runs the engine without a pause; calls from the controller only touch queues, other threads fetch KV, so no Ray
call sits between two decode steps. jax is imported after the process environment is set.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.core.chaos import delay_s
from seer_jax.core.events import Event, InstanceReport
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId
from seer_jax.distributed.kv_pool import CALL_TIMEOUT_S, RayKVPool
from seer_jax.distributed.mailbox import Answer, Batches, Mailbox

REPORT_INTERVAL_S = 0.5
POLL_TIMEOUT_S = 5.0
LINGER_S = 0.01
"""How long `poll` waits for more events to share its call while the instance needs chunks soon."""
LINGER_BUSY_S = 0.05
"""The same while it has chunks queued for half of the prefetch."""
FETCH_TIMEOUT_S = 60.0
"""A fetch waits for the dispatch under way at the other instance."""
MAX_CONCURRENCY = 8
"""Calls that may be under way at an instance: `poll`, `send`, and other instances' `take_kv`."""


class InstanceActor:
    """Owns an engine; `send`, `poll` and `start_iteration` feed it, `poll` returns what happened.

    As long as it has work it tells something at least every `REPORT_INTERVAL_S`, or whenever a dispatch ends.

    `ray_cluster` makes it an actor, whose calls run on a pool of `MAX_CONCURRENCY` threads.
    """

    def start(
        self,
        instance_id: int,
        model_config: Any,
        params: Mapping[str, Any],
        config: RunConfig,
        place: int,
        run_name: str,
        is_replacement: bool,
        on_cpu: bool,
    ) -> InstanceInfo:
        """Build the engine and compile its programs.

        Not the constructor: what a call raises reaches the caller as itself, what a constructor raises does not.

        Args:
            instance_id: Name in events.
            model_config: The decoder's `DecoderConfig`.
            params: Weights as host arrays.
            config: The run.
            place: Which of the run's instances it is, or takes the place of; from 0 on.
            run_name: See `kvpool.factory.open_pool`.
            is_replacement: Whether the run is under way.
            on_cpu: Compute on this instance's share of the cores instead of an accelerator.

        Returns:
            Capacity of the engine.

        Raises:
            ConfigError: If the mesh does not fit the devices or the model.
        """
        if on_cpu:
            # XLA reads all of this when its client starts; it sizes its thread pool by the affinity.
            os.sched_setaffinity(0, share_of_cores(place, config.rollout.instances))
            os.environ["JAX_PLATFORMS"] = "cpu"
            num_devices = f"--xla_force_host_platform_device_count={num_mesh_devices(config.sharding)}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {num_devices}"
        from seer_jax.distributed.draft_sync import DraftSync
        from seer_jax.engine.factory import build_engine

        self._has_own_pool = config.kvpool.backend == "embedded"
        self._shared_pool: RayKVPool | None = None
        if config.kvpool.backend == "ray":
            # The engine waits for it at times, and must not look silent meanwhile.
            timeout_s = min(CALL_TIMEOUT_S, config.rollout.instance_timeout_s / 4)
            self._shared_pool = RayKVPool(ray.get_runtime_context().get_node_id(), timeout_s=timeout_s)
        self._engine = build_engine(
            config,
            model_config,
            params,
            instance_id=instance_id,
            place=place,
            kv_pool=self._shared_pool,
            run_name=run_name,
            is_replacement=is_replacement,
        )
        self._peers: Mapping[int, Any] = {}
        self._inbox: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._happened: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._mailbox = Mailbox(self._take, self._collect)
        self._chaos, self._place = config.chaos, place
        # A peer that hangs must not make this instance look silent.
        self._fetch_timeout_s = min(FETCH_TIMEOUT_S, config.rollout.instance_timeout_s / 4)
        self._is_urgent = threading.Event()
        self._many_queued = max(1, config.rollout.prefetch_chunks // 2)
        self._transfers = ThreadPoolExecutor(2, "transfers")
        self._thread = ThreadPoolExecutor(1, "engine").submit(self._serve)
        self._draft_sync: DraftSync | None = None
        if self._engine.speculator is not None:
            self._draft_sync = DraftSync(
                self._engine.speculator.client,
                config.speculation.sync_interval_s,
                self._run_between_steps,
                lambda: self._engine.wants_drafts,
            )
            threading.Thread(target=self._draft_sync.serve, name="drafts", daemon=True).start()
        return self._engine.info

    def meet(
        self, peers: Mapping[int, Any], draft_servers: Sequence[Any], owners: Mapping[str, Any], directory: Any
    ) -> None:
        """Learn the actors of all instances, from which paused requests may come, of draft servers and KV pool."""
        self._peers = peers
        if self._shared_pool is not None:
            self._shared_pool.connect(owners, directory)
        if self._draft_sync is not None:
            self._draft_sync.connect(draft_servers)

    def flush_drafts(self) -> None:
        """Tell the draft servers what they have not heard of the iteration that ends."""
        if self._draft_sync is not None:
            self._draft_sync.exchange()

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Engine.start_iteration`; returns when done."""
        self._run_between_steps(partial(self._engine.start_iteration, policy_version, params))

    def take_kv(self, request_id: RequestId) -> Any:
        """See `Engine.take_kv`; called by the instance where the request goes on."""
        return self._run_between_steps(partial(self._engine.begin_take_kv, request_id))()

    def send(self, batches: Batches) -> None:
        """Queue chunks; the engine runs on meanwhile."""
        self._mailbox.receive(batches)

    def poll(self, number: int, batches: Batches) -> Answer:
        """Queue chunks, then wait for events, at most `POLL_TIMEOUT_S`; raises what the engine raised.

        See `Mailbox.poll`.
        """
        if self._thread.done():
            self._thread.result()
        return self._mailbox.poll(number, batches)

    def _take(self, chunk: RequestChunk) -> None:
        """Queue a chunk; one with KV elsewhere as soon as it is fetched."""
        if chunk.kv is None or chunk.kv.ref == self._engine.info.instance_id:
            self._inbox.put(partial(self._engine.submit, chunk))
        else:
            fetched = self._transfers.submit(self._fetch, chunk)
            fetched.add_done_callback(lambda done: self._inbox.put(done.result))

    def _collect(self) -> list[Event]:
        """Wait for events; several share a call."""
        events: list[Event] = []
        try:
            events.append(self._happened.get(timeout=POLL_TIMEOUT_S))
            self._is_urgent.wait(LINGER_BUSY_S if self._engine.num_queued >= self._many_queued else LINGER_S)
            self._is_urgent.clear()
            while True:
                events.append(self._happened.get_nowait())
        except queue.Empty:
            return events

    def _serve(self) -> None:
        engine, reported = self._engine, 0.0
        while True:
            while not engine.has_work or not self._inbox.empty():
                self._inbox.get()()
            started = time.monotonic()
            finished = engine.step()
            if self._chaos.slow_instance > 1:
                time.sleep(delay_s(self._chaos, self._place, time.monotonic() - started))
            if finished or time.monotonic() - reported > REPORT_INTERVAL_S:
                # Before the chunks it counts: the last chunk ends the iteration, and a later report would leak into
                # the next one.
                reported = time.monotonic()
                self._happened.put(InstanceReport(status=engine.status()))
            for event in finished:
                self._happened.put(event)
                if event.kv is not None and not engine.num_queued:
                    self._is_urgent.set()  # The request could go on at once.
            if not engine.has_work:
                self._is_urgent.set()

    def _run_between_steps(self, call: Callable[[], Any]) -> Any:
        """Let the engine's thread make a call; returns its result, raises what the thread died of."""
        done: Future[Any] = Future()
        self._inbox.put(lambda: done.set_result(call()))
        wait([done, self._thread], return_when=FIRST_COMPLETED)
        return done.result() if done.done() else self._thread.result()

    def _fetch(self, chunk: RequestChunk) -> None:
        """Get the KV from the instance that keeps it, then queue the chunk; without KV if it is gone or in the pool."""
        moved, peer = None, self._peers.get(chunk.kv.ref)
        try:
            if peer is not None:
                moved = ray.get(peer.take_kv.remote(chunk.request_id), timeout=self._fetch_timeout_s)
        except RayError as error:
            logging.warning("Instance %s does not give KV: %s", chunk.kv.ref, error)
        if moved is None and self._has_own_pool:
            logging.info("KV of %s is computed again: it is gone, or that was measured to be faster", chunk.request_id)
        self._inbox.put(partial(self._engine.submit, replace(chunk, kv=replace(chunk.kv, ref=moved))))


def share_of_cores(instance_id: int, num_instances: int) -> list[int]:
    """An equal share of this machine's cores, disjoint while there are enough of them."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_instances)
    first = instance_id * share % len(cores)
    return cores[first : first + share]
