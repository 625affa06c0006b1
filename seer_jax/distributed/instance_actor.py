"""One inference instance in its own process, on its own devices.

A thread runs the engine without a pause; calls from the controller only touch queues, so no Ray call sits between two
decode steps. jax is imported after the process environment is set.
"""

import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.core.errors import TransferError
from seer_jax.core.events import Event, InstanceReport
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

        self._engine = build_engine(config, model_config, params, instance_id=instance_id, kv_store=ObjectStoreKV())
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
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
        while not done.done() and not self._thread.done():
            time.sleep(0.001)
        if not done.done():
            self._thread.result()

    def send(self, chunks: Sequence[RequestChunk]) -> None:
        """Queue chunks."""
        for chunk in chunks:
            self._inbox.put(lambda chunk=chunk: self._engine.submit(chunk))

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

    def close(self) -> None:
        """End the engine thread."""
        self._inbox.put(None)

    def _serve(self) -> None:
        engine, reported = self._engine, 0.0
        while True:
            while not engine.has_work or not self._inbox.empty():
                call = self._inbox.get()
                if call is None:
                    return
                call()
            finished = engine.step()
            for event in finished:
                self._outbox.put(event)
            if finished or time.monotonic() - reported > REPORT_INTERVAL_S:
                reported = time.monotonic()
                self._outbox.put(InstanceReport(status=engine.status()))


class ObjectStoreKV:
    """KV of paused chunks in Ray's object store: any instance can fetch it, it dies with the instance that wrote it."""

    def put(self, kv: Any) -> ray.ObjectRef:
        """Keep `kv` while its handle is referenced."""
        return ray.put(kv)

    def get(self, handle: KVHandle) -> Any:
        """Fetch it, zero-copy on the same node."""
        if handle.ref is None:
            raise TransferError("the KV handle came without a reference")
        try:
            return ray.get(handle.ref, timeout=FETCH_TIMEOUT_S)
        except (ObjectLostError, GetTimeoutError) as error:
            raise TransferError(f"KV block is gone: {error}") from error
