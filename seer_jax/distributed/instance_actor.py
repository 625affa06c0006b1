"""One inference instance in its own process, on its own devices.

A thread runs the engine without a pause; calls from the controller only touch queues, other threads fetch and publish
KV, so no Ray call sits between two decode steps. jax is imported after the process environment is set.
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
from seer_jax.core.events import ChunkFinished, Event, InstanceReport
from seer_jax.core.types import InstanceInfo, RequestChunk

REPORT_INTERVAL_S = 0.5
POLL_TIMEOUT_S = 5.0
LINGER_S = 0.01
"""How long `poll` waits for more events to share its call while the instance needs chunks soon."""
LINGER_BUSY_S = 0.05
"""The same while it has chunks queued for half of the prefetch."""
FETCH_TIMEOUT_S = 10.0


class InstanceActor:
    """Owns an engine; `send`, `poll` and `start_iteration` feed it, `poll` returns what happened.

    `ray_cluster` makes it an actor, whose calls run on a shared pool of three threads.
    """

    def start(
        self, instance_id: int, model_config: Any, params: Mapping[str, Any], config: RunConfig, on_cpu: bool
    ) -> InstanceInfo:
        """Build the engine and compile its programs.

        Not the constructor: what a call raises reaches the caller as itself, what a constructor raises does not.

        Args:
            instance_id: Name in events.
            model_config: The decoder's `DecoderConfig`.
            params: Weights as host arrays.
            config: The run.
            on_cpu: Compute on this instance's share of the cores instead of an accelerator.

        Returns:
            Capacity of the engine.

        Raises:
            ConfigError: If the mesh does not fit the devices or the model.
        """
        if on_cpu:
            # XLA reads all of this when its client starts; it sizes its thread pool by the affinity.
            os.sched_setaffinity(0, _share_of_cores(instance_id, config.rollout.instances))
            os.environ["JAX_PLATFORMS"] = "cpu"
            num_devices = f"--xla_force_host_platform_device_count={num_mesh_devices(config.sharding)}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {num_devices}"
        from seer_jax.engine.factory import build_engine

        self._engine = build_engine(config, model_config, params, instance_id=instance_id)
        self._inbox: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_urgent = threading.Event()
        self._many_queued = max(1, config.rollout.prefetch_chunks // 2)
        self._transfers = ThreadPoolExecutor(2, "transfers")
        self._thread = ThreadPoolExecutor(1, "engine").submit(self._serve)
        return self._engine.info

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Engine.start_iteration`; returns when done."""
        done: Future[None] = Future()

        def run() -> None:
            self._engine.start_iteration(policy_version, params)
            done.set_result(None)

        self._inbox.put(run)
        wait([done, self._thread], return_when=FIRST_COMPLETED)
        if not done.done():
            self._thread.result()

    def send(self, chunks: Sequence[RequestChunk]) -> None:
        """Queue chunks, those with KV as soon as it is fetched; the engine runs on meanwhile."""
        for chunk in chunks:
            if chunk.kv is None:
                self._inbox.put(partial(self._engine.submit, chunk))
            else:
                self._transfer(self._fetch, chunk)

    def poll(self, chunks: Sequence[RequestChunk]) -> list[Event]:
        """Queue chunks, then wait for events, at most `POLL_TIMEOUT_S`; raises what the engine raised."""
        self.send(chunks)
        if self._thread.done():
            self._thread.result()
        events: list[Event] = []
        try:
            events.append(self._outbox.get(timeout=POLL_TIMEOUT_S))
            self._is_urgent.wait(LINGER_BUSY_S if self._engine.num_queued >= self._many_queued else LINGER_S)
            self._is_urgent.clear()
            while True:
                events.append(self._outbox.get_nowait())
        except queue.Empty:
            return events

    def _serve(self) -> None:
        engine, reported = self._engine, 0.0
        while True:
            while not engine.has_work or not self._inbox.empty():
                self._inbox.get()()
            finished = engine.step()
            if finished or time.monotonic() - reported > REPORT_INTERVAL_S:
                # Before the chunks it counts: the last chunk ends the iteration, and a later report would leak into
                # the next one.
                reported = time.monotonic()
                self._outbox.put(InstanceReport(status=engine.status()))
            for event in finished:
                if event.kv is None:
                    self._outbox.put(event)
                else:
                    self._transfer(self._publish, event)
            if not engine.has_work:
                self._is_urgent.set()

    def _transfer(self, move: Callable[[Any], None], item: RequestChunk | ChunkFinished) -> None:
        """Run `move(item)` on a transfer thread; what it raises, the engine's thread raises again for `poll`."""
        self._transfers.submit(move, item).add_done_callback(lambda done: self._inbox.put(done.result))

    def _fetch(self, chunk: RequestChunk) -> None:
        """Get the KV out of Ray's object store, then queue the chunk; without KV if the block died with its writer."""
        try:
            kv = replace(chunk.kv, ref=ray.get(chunk.kv.ref, timeout=FETCH_TIMEOUT_S))
        except RayError as error:
            logging.warning("KV of %s is lost and will be computed again: %s", chunk.request_id, error)
            kv = None
        self._inbox.put(partial(self._engine.submit, replace(chunk, kv=kv)))

    def _publish(self, event: ChunkFinished) -> None:
        """Put the KV of a paused request where any instance can fetch it, then report the chunk."""
        try:
            kv = replace(event.kv, ref=ray.put(event.kv.ref))
        except RayError as error:
            logging.warning("KV of %s is dropped and will be computed again: %s", event.request_id, error)
            kv = None
        self._outbox.put(replace(event, kv=kv))
        self._is_urgent.set()  # The request could go on at once.


def _share_of_cores(instance_id: int, num_instances: int) -> list[int]:
    """An equal share of this machine's cores, disjoint while there are enough of them."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_instances)
    first = instance_id * share % len(cores)
    return cores[first : first + share]
