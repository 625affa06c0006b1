"""One inference instance in its own process, on its own devices.

A thread runs the engine without a pause; calls from the controller only touch queues, other threads fetch and publish
KV, so no Ray call sits between two decode steps. jax is imported after the process environment is set.
"""

import logging
import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.core.events import ChunkFinished, Event, InstanceReport
from seer_jax.core.types import InstanceInfo, KVHandle, RequestChunk

REPORT_INTERVAL_S = 0.5
POLL_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 10.0


class InstanceActor:
    """Owns an engine; `send` and `start_iteration` feed it, `poll` returns what happened.

    `ray_cluster` makes it an actor, with one thread for each of these calls.
    """

    def __init__(
        self, instance_id: int, model_config: Any, params: Mapping[str, Any], config: RunConfig, cores: Sequence[int]
    ) -> None:
        """Build the engine and compile its programs.

        Args:
            instance_id: Name in events.
            model_config: The decoder's `DecoderConfig`.
            params: Weights as host arrays.
            config: The run.
            cores: CPU cores for this process, which then computes on the CPU; empty = an accelerator's instance.
        """
        if cores:
            # XLA reads all of this when its client starts; it sizes its thread pool by the affinity.
            os.sched_setaffinity(0, cores)
            os.environ["JAX_PLATFORMS"] = "cpu"
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_mesh_devices(config.sharding)}"
        from seer_jax.engine.factory import build_engine

        self._engine = build_engine(config, model_config, params, instance_id=instance_id)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._publisher = ThreadPoolExecutor(1, "publisher")
        self._thread = ThreadPoolExecutor(1, "engine").submit(self._serve)

    def info(self) -> InstanceInfo:
        """Capacity; answers once the engine is ready."""
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
        """Fetch the KV of chunks, then queue them; the engine runs on meanwhile."""
        for chunk in chunks:
            fetched = chunk if chunk.kv is None else replace(chunk, kv=_fetch(chunk.kv))
            self._inbox.put(lambda chunk=fetched: self._engine.submit(chunk))

    def poll(self) -> list[Event]:
        """Wait for events, at most `POLL_TIMEOUT_S`; raises what the engine raised."""
        if self._thread.done():
            self._thread.result()
        events: list[Event] = []
        try:
            events.append(self._outbox.get(timeout=POLL_TIMEOUT_S))
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
            for event in finished:
                if event.kv is None:
                    self._outbox.put(event)
                else:
                    self._publisher.submit(self._publish, event)
            if finished or time.monotonic() - reported > REPORT_INTERVAL_S:
                reported = time.monotonic()
                self._outbox.put(InstanceReport(status=engine.status()))

    def _publish(self, event: ChunkFinished) -> None:
        """Put the KV of a paused request where any instance can fetch it, then report the chunk."""
        try:
            kv = replace(event.kv, ref=ray.put(event.kv.ref))
        except RayError as error:
            logging.warning("KV of %s is dropped and will be computed again: %s", event.request_id, error)
            kv = None
        self._outbox.put(replace(event, kv=kv))


def _fetch(handle: KVHandle) -> KVHandle | None:
    """Resolve a reference into Ray's object store; None if the block died with the instance that wrote it."""
    try:
        return replace(handle, ref=ray.get(handle.ref, timeout=FETCH_TIMEOUT_S))
    except (ObjectLostError, GetTimeoutError):
        return None
