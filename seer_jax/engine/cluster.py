"""A set of instances as the rollout loop sees it, and the in-process implementation."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from seer_jax.config.schema import ChaosConfig, SpeculationConfig
from seer_jax.core.chaos import delay_s
from seer_jax.core.draft.server import DraftServer
from seer_jax.core.errors import ProtocolError
from seer_jax.core.events import Event, InstanceJoined, InstanceLost, InstanceReport
from seer_jax.core.types import InstanceInfo, RequestChunk
from seer_jax.engine.engine import NO_CHAOS, NO_SPECULATION, Engine
from seer_jax.kvpool import PoolStats


@runtime_checkable
class Cluster(Protocol):
    """Instances that run chunks: in this process (`LocalCluster`) or as Ray actors (`distributed.RayCluster`)."""

    @property
    def infos(self) -> Sequence[InstanceInfo]:
        """The live instances."""
        ...

    @property
    def expects_instances(self) -> bool:
        """Whether instances are on their way, which `wait` will report as joined."""
        ...

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """Reset counters and give every instance these weights, unless None; returns when all have them."""
        ...

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """Hand chunks to instances, keyed by instance id; does not wait for them to run."""
        ...

    def wait(self) -> list[Event]:
        """Block until something happened anywhere, or for a while: chunks, telemetry, instances lost and joined."""
        ...

    def kill(self, instance_id: int) -> None:
        """Let an instance die at once with all that it has, as a fault would; for tests and `--chaos`."""
        ...

    def kill_pool_owner(self) -> None:
        """Let an owner of the KV pool that instances share die with all that it has; for tests and `--chaos`.

        Raises:
            ProtocolError: If they share none.
        """
        ...

    @property
    def num_dropped_messages(self) -> int:
        """Messages to and from instances that `chaos.drop_message` took since the iteration began."""
        ...

    def pool_stats(self) -> PoolStats:
        """Figures of the iteration for the KV pool that instances share, all owners together; zeros without one."""
        ...

    def close(self) -> None:
        """Stop all instances."""
        ...


class LocalCluster:
    """All instances in this process, stepped in turn: for debugging, and for the reference run."""

    def __init__(
        self,
        engines: Sequence[Engine],
        speculation: SpeculationConfig = NO_SPECULATION,
        *,
        build: Callable[[int, int, Mapping[str, Any]], Engine] | None = None,
        max_replacements: int = 0,
        chaos: ChaosConfig = NO_CHAOS,
    ) -> None:
        """Take over engines, and let those that draft from their groups share what they said.

        Args:
            engines: Warmed up.
            speculation: That of the engines.
            build: Makes the engine that takes the place of one that was killed, from that place, its own id and the
                weights.
            max_replacements: How many there may be in each iteration.
            chaos: Faults.
        """
        self._build, self._max_replacements, self._chaos = build, max_replacements, chaos
        self._num_replaced = 0
        self._pending: list[Event] = []
        self._places = {engine.info.instance_id: place for place, engine in enumerate(engines)}
        self._next_id = 1 + max(self._places)
        self._draft_server: DraftServer | None = None
        if speculation.mode in ("grouped", "grouped_tree") and speculation.draft_servers:
            self._draft_server = DraftServer(memory_tokens=speculation.memory_tokens)
        self._sync_interval_s, self._synced = speculation.sync_interval_s, time.monotonic()
        self._engines = {engine.info.instance_id: engine for engine in engines}

    @property
    def infos(self) -> Sequence[InstanceInfo]:
        """See `Cluster`."""
        return [engine.info for engine in self._engines.values()]

    @property
    def expects_instances(self) -> bool:
        """See `Cluster`."""
        return any(isinstance(event, InstanceJoined) for event in self._pending)

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Cluster`."""
        self._num_replaced = 0
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
                if instance_id in self._engines:  # Else its loss is about to be reported.
                    self._engines[instance_id].submit(chunk)

    def wait(self) -> list[Event]:
        """See `Cluster`: run one dispatch on every instance that has work."""
        events = [event for event in self._pending if isinstance(event, InstanceLost)] or self._pending
        self._pending = [event for event in self._pending if event not in events]
        for engine in self._engines.values():
            if engine.has_work:
                started = time.monotonic()
                events += engine.step()
                if self._chaos.slow_instance > 1:
                    time.sleep(delay_s(self._chaos, self._places[engine.info.instance_id], time.monotonic() - started))
                events.append(InstanceReport(status=engine.status()))
        if self._draft_server is not None and time.monotonic() - self._synced > self._sync_interval_s:
            self._synced = time.monotonic()
            self._exchange_drafts(self._draft_server)
        return events

    def kill(self, instance_id: int) -> None:
        """See `Cluster`."""
        dead, place = self._engines.pop(instance_id), self._places[instance_id]
        dead.close()
        self._pending.append(InstanceLost(instance_id=instance_id))
        if self._build is None or self._num_replaced >= self._max_replacements:
            return
        self._num_replaced += 1
        engine = self._build(place, self._next_id, dead.params)
        engine.start_iteration(dead.policy_version)
        self._engines[self._next_id], self._places[self._next_id] = engine, place
        self._pending.append(InstanceJoined(info=engine.info, policy_version=dead.policy_version))
        self._next_id += 1

    def kill_pool_owner(self) -> None:
        """See `Cluster`."""
        raise ProtocolError("a KV pool has no owner in this process")

    @property
    def num_dropped_messages(self) -> int:
        """See `Cluster`: calls in one process are no messages."""
        return 0

    def pool_stats(self) -> PoolStats:
        """See `Cluster`."""
        return PoolStats()

    def _exchange_drafts(self, server: DraftServer) -> None:
        for client in (engine.speculator.client for engine in self._engines.values()):
            client.apply(server.exchange(client.epoch, client.updates(), client.held()))

    def close(self) -> None:
        """Drop the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
