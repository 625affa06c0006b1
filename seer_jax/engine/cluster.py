"""A set of instances as the rollout loop sees it, and the in-process implementation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from seer_jax.config.schema import SpeculationConfig
from seer_jax.core.draft.server import DraftServer
from seer_jax.core.events import Event, InstanceReport
from seer_jax.core.types import InstanceInfo, RequestChunk
from seer_jax.engine.engine import NO_SPECULATION, Engine


@runtime_checkable
class Cluster(Protocol):
    """Instances that run chunks: in this process (`LocalCluster`) or as Ray actors (`distributed.RayCluster`)."""

    infos: Sequence[InstanceInfo]

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """Reset counters and give every instance these weights, unless None; returns when all have them."""
        ...

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """Hand chunks to instances, keyed by instance id; does not wait for them to run."""
        ...

    def wait(self) -> list[Event]:
        """Block until something happened anywhere; finished chunks and telemetry."""
        ...

    def close(self) -> None:
        """Stop all instances."""
        ...


class LocalCluster:
    """All instances in this process, stepped in turn: for debugging, and for the reference run."""

    def __init__(self, engines: Sequence[Engine], speculation: SpeculationConfig = NO_SPECULATION) -> None:
        """Take over engines, and let those that draft from their groups share what they said.

        Args:
            engines: Warmed up.
            speculation: That of the engines.
        """
        self._draft_server: DraftServer | None = None
        if speculation.mode in ("grouped", "grouped_tree") and speculation.draft_servers:
            self._draft_server = DraftServer(memory_tokens=speculation.memory_tokens)
        self._sync_interval_s, self._synced = speculation.sync_interval_s, time.monotonic()
        self._engines = {engine.info.instance_id: engine for engine in engines}
        self.infos = [engine.info for engine in engines]

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Cluster`."""
        if self._draft_server is not None:
            self._exchange_drafts(self._draft_server)  # What was said last, for its memory.
            self._draft_server.start_epoch(policy_version)
        for engine in self._engines.values():
            engine.start_iteration(policy_version, params)

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """See `Cluster`."""
        for instance_id, batch in chunks.items():
            for chunk in batch:
                kv = chunk.kv
                if kv is not None and kv.ref != instance_id:
                    owner = self._engines.get(kv.ref)
                    moved = None if owner is None else owner.take_kv(chunk.request_id)
                    chunk = replace(chunk, kv=replace(kv, ref=moved))
                self._engines[instance_id].submit(chunk)

    def wait(self) -> list[Event]:
        """Run one dispatch on every instance that has work."""
        events: list[Event] = []
        for engine in self._engines.values():
            if engine.has_work:
                events += engine.step()
                events.append(InstanceReport(status=engine.status()))
        if self._draft_server is not None and time.monotonic() - self._synced > self._sync_interval_s:
            self._synced = time.monotonic()
            self._exchange_drafts(self._draft_server)
        return events

    def _exchange_drafts(self, server: DraftServer) -> None:
        for client in (engine.speculator.client for engine in self._engines.values()):
            client.apply(server.exchange(client.epoch, client.updates(), client.held()))

    def close(self) -> None:
        """Drop the engines."""
        self._engines.clear()
