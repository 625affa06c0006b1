"""The cluster of instance actors, as the rollout loop sees it."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from seer_jax.config.schema import RunConfig
from seer_jax.core.chaos import Chaos
from seer_jax.core.errors import InstanceLostError, ProtocolError
from seer_jax.core.events import Event, InstanceJoined, InstanceLost
from seer_jax.core.types import InstanceInfo, RequestChunk
from seer_jax.distributed.draft_sync import DraftServers
from seer_jax.distributed.instance_actor import MAX_CONCURRENCY, InstanceActor
from seer_jax.distributed.mailbox import Outbox
from seer_jax.distributed.pool_owners import PoolOwners
from seer_jax.distributed.resources import (
    actor_resources,
    check_resources,
    find_platform,
    get_result,
    is_loss,
    min_instances,
)
from seer_jax.kvpool import PoolStats
from seer_jax.kvpool.factory import new_run_name

FLUSH_TIMEOUT_S = 30.0
WEIGHTS_TIMEOUT_S = 600.0
"""Longest that an instance may take for new weights, unless `rollout.instance_timeout_s` is longer."""
START_TIMEOUT_S = 1800.0
"""The same for a replacement to start and compile."""
WATCH_INTERVAL_S = 1.0
"""How often silent instances are looked for at least."""


@dataclass(eq=False)
class Instance:
    """What the controller knows of an actor.

    Attributes:
        place: Which of the run's instances it is, or replaces.
        heard: When it last gave a sign of life, by `time.monotonic`; infinity before Ray has a place for it.
        placed: A call that ends when Ray has.
        info: Its capacity; None until its engine is built.
        policy_version: Weights that it was told to take last.
    """

    instance_id: int
    actor: Any
    place: int
    heard: float
    placed: Any
    outbox: Outbox = field(default_factory=Outbox)
    info: InstanceInfo | None = None
    policy_version: int = 0


class RayCluster:
    """Implements `engine.cluster.Cluster` over actors.

    At most one `poll` per instance is outstanding; what answers a poll's events travels with the next poll, because
    every Ray call costs about two milliseconds of CPU in all. Messages may be lost (`mailbox.py`). An instance that
    dies, whose device fails, or that is silent for `rollout.instance_timeout_s` while it has work, is reported lost; a
    new actor with the current weights takes its place and joins when it is ready.
    """

    def __init__(
        self, config: RunConfig, model_config: Any, params: Mapping[str, Any], *, first_instance_id: int = 0
    ) -> None:
        """Start Ray unless it runs, start the actors and wait until `rollout.min_instances` engines are compiled.

        Args:
            config: The run.
            model_config: The decoder's `DecoderConfig`.
            params: Weights as host arrays; travel once through the object store.
            first_instance_id: Ids count from here; a resumed rollout must not meet an old one again.

        Raises:
            ConfigError: If the cluster cannot hold the instances, or an engine cannot be built.
        """
        self._config, self._model_config = config, model_config
        self._chaos, self._run_name = Chaos(config.chaos), new_run_name()
        self._owns_ray = not ray.is_initialized()
        self._next_id = first_instance_id
        self._num_replaced, self._policy_version, self._last_cause = 0, 0, "none"
        self._instances: dict[int, Instance] = {}
        self._polls: dict[Any, Instance] = {}
        self._starting: dict[Any, Instance] = {}
        self._draft_servers: DraftServers | None = None
        self._pool_owners: PoolOwners | None = None
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            if self._owns_ray:
                start_ray()
            self._platform = find_platform()
            check_resources(self._platform, config)
            if config.kvpool.backend == "ray":
                self._pool_owners = PoolOwners(config)
            self._weights = ray.put(params)
            self._actor_class = ray.remote(InstanceActor).options(
                max_concurrency=MAX_CONCURRENCY, **actor_resources(self._platform, config)
            )
            started = [self._start(place, is_replacement=False) for place in range(config.rollout.instances)]
            self._await_first(started, min_instances(config))
            if config.speculation.mode in ("grouped", "grouped_tree"):
                speculation = config.speculation
                self._draft_servers = DraftServers(speculation.draft_servers, speculation.memory_tokens)
            ray.get(self._introduce())
            on_failure.pop_all()

    @property
    def infos(self) -> Sequence[InstanceInfo]:
        """See `Cluster`."""
        return [instance.info for instance in self._instances.values()]

    @property
    def expects_instances(self) -> bool:
        """See `Cluster`."""
        return bool(self._starting)

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Cluster`. Weights go to the object store once, every node fetches them once."""
        if self._draft_servers is not None:
            if self._config.speculation.memory_tokens and self._instances:
                flushed = [instance.actor.flush_drafts.remote() for instance in self._instances.values()]
                ray.wait(flushed, num_returns=len(flushed), timeout=FLUSH_TIMEOUT_S)
            self._draft_servers.start_epoch(policy_version)
            self._introduce()  # An instance that gave a server up, or that of a new one, hears of it again.
        if self._pool_owners is not None:
            self._pool_owners.start_iteration()
        self._policy_version, self._num_replaced, self._chaos.num_dropped = policy_version, 0, 0
        if params is not None:
            self._weights = ray.put(params)
        weights = None if params is None else self._weights
        started = [(i, i.actor.start_iteration.remote(policy_version, weights)) for i in self._instances.values()]
        for instance, ref in started:
            try:
                ray.get(ref, timeout=max(WEIGHTS_TIMEOUT_S, self._config.rollout.instance_timeout_s))
            except RayError as error:
                if not is_loss(error):
                    raise
                # Dead, hung, or out of reach and then without these weights; its poll fails, and `wait` reports it.
                ray.kill(instance.actor)

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """See `Cluster`. Chunks sent to an instance that just died are reported lost with it."""
        polled = set(self._polls.values())
        for instance_id, batch in chunks.items():
            instance = self._instances.get(instance_id)
            if instance is None:
                continue
            if not instance.outbox.num_in_flight:
                instance.heard = time.monotonic()
            message = instance.outbox.add(batch)
            if instance not in polled:
                self._poll(instance)
            elif not self._chaos.drops_message():
                instance.actor.send.remote(message)

    def wait(self) -> list[Event]:
        """See `Cluster`; returns after `WATCH_INTERVAL_S` without events, too.

        Raises:
            InstanceLostError: If the loss of every instance has been reported already, and none is to come.
        """
        if not self._instances and not self._starting:
            raise InstanceLostError(f"all instances are lost; the last cause: {self._last_cause}")
        polled = set(self._polls.values())
        for instance in self._instances.values():
            if instance not in polled:
                self._poll(instance)
        watches = {} if self._pool_owners is None else self._pool_owners.watches
        if watches:
            self._pool_owners.kill_silent()
        calls = [*self._starting, *self._polls, *watches]
        ray.wait(calls, num_returns=1, timeout=WATCH_INTERVAL_S)
        # All that is there, or one that answered long ago would pass for silent after a stall of this process.
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        events: list[Event] = []
        for ref in ready:
            if ref in watches:
                self._pool_owners.replace(ref)
                self._introduce()
                continue
            events += self._open(ref) if ref in self._polls else self._go_on_starting(ref)
        now = time.monotonic()
        for instance in list(self._instances.values()):
            if instance.outbox.num_in_flight and now - instance.heard > self._config.rollout.instance_timeout_s:
                events += self._lose(instance, f"it was silent for {now - instance.heard:.0f} s")
        for ref, instance in list(self._starting.items()):
            if instance.heard == math.inf and ray.wait([instance.placed], timeout=0)[0]:
                instance.heard = now
            if now - instance.heard > START_TIMEOUT_S:
                del self._starting[ref]
                self._replace(instance, f"it did not start within {START_TIMEOUT_S:.0f} s")
        return events

    def kill(self, instance_id: int) -> None:
        """See `Cluster`. The process is gone at once; `wait` finds out by itself."""
        ray.kill(self._instances[instance_id].actor)

    def kill_pool_owner(self) -> None:
        """See `Cluster`."""
        if self._pool_owners is None:
            raise ProtocolError(f"instances share no pool with kvpool.backend={self._config.kvpool.backend}")
        self._pool_owners.kill()

    @property
    def num_dropped_messages(self) -> int:
        """See `Cluster`."""
        return self._chaos.num_dropped

    def pool_stats(self) -> PoolStats:
        """See `Cluster`."""
        return PoolStats() if self._pool_owners is None else self._pool_owners.stats()

    def close(self) -> None:
        """Stop the actors, and Ray if this object started it."""
        for instance in (*self._instances.values(), *self._starting.values()):
            ray.kill(instance.actor)
        self._instances.clear()
        self._starting.clear()
        self._polls.clear()
        if self._draft_servers is not None:
            self._draft_servers.close()
        if self._pool_owners is not None:
            self._pool_owners.close()
        if self._owns_ray:
            ray.shutdown()

    def _start(self, place: int, *, is_replacement: bool) -> Any:
        """Start an actor and let it build its engine; returns the call under way."""
        actor, instance_id = self._actor_class.remote(), self._next_id
        self._next_id += 1
        ref = actor.start.remote(
            instance_id,
            self._model_config,
            self._weights,
            self._config,
            place,
            self._run_name,
            is_replacement,
            self._platform == "cpu",
        )
        # Ray may have no place for it, for as long as it takes: only then does it begin to be silent.
        self._starting[ref] = Instance(instance_id, actor, place, heard=math.inf, placed=actor.__ray_ready__.remote())
        return ref

    def _await_first(self, started: Sequence[Any], num_needed: int) -> None:
        """Wait until so many engines are built; a lost actor is replaced while others can make up for it."""
        while len(self._instances) < num_needed:
            (ref,), _ = ray.wait(list(self._starting), num_returns=1)
            instance = self._starting.pop(ref)
            try:
                instance.info = get_result(ref)
            except RayTaskError:
                raise
            except RayError as error:
                if num_needed == len(started):
                    raise
                self._replace(instance, error)
                if len(self._instances) + len(self._starting) < num_needed:
                    raise
                continue
            instance.heard = time.monotonic()
            self._instances[instance.instance_id] = instance
        self._instances = dict(sorted(self._instances.items()))  # Whoever was ready first.

    def _go_on_starting(self, ref: Any) -> list[Event]:
        """Take a later instance's next step: built, then told the version of its weights, then joined."""
        instance = self._starting.pop(ref)
        try:
            result = ray.get(ref)
        except RayError as error:
            # Whatever it is, the others can go on; that it happens again is what `max_replacements` is for.
            self._replace(instance, error)
            return []
        is_built = instance.info is None
        if is_built:
            instance.info = result
        if is_built or instance.policy_version != self._policy_version:
            instance.policy_version = self._policy_version
            told = instance.actor.start_iteration.remote(self._policy_version, self._weights)
            self._starting[told] = instance
            return []
        self._instances[instance.instance_id] = instance
        instance.heard = time.monotonic()
        if self._pool_owners is not None:
            self._pool_owners.refresh()
        self._introduce()
        return [InstanceJoined(info=instance.info, policy_version=self._policy_version)]

    def _open(self, ref: Any) -> list[Event]:
        """Take in the answer of a poll."""
        instance = self._polls.pop(ref)
        try:
            answer = ray.get(ref)
        except ObjectLostError:
            return []  # The next poll asks again.
        except RayError as error:
            if not is_loss(error):
                raise
            return self._lose(instance, error)
        if self._chaos.drops_message():
            return []
        events = instance.outbox.open(answer)
        if events or not instance.outbox.num_in_flight:
            instance.heard = time.monotonic()
        return events

    def _lose(self, instance: Instance, cause: Any) -> list[Event]:
        del self._instances[instance.instance_id]
        self._polls = {ref: other for ref, other in self._polls.items() if other is not instance}
        self._replace(instance, cause)
        return [InstanceLost(instance_id=instance.instance_id)]

    def _replace(self, instance: Instance, cause: Any) -> None:
        """Make sure that an actor is gone, and start another in its place while there may be one."""
        ray.kill(instance.actor)
        self._last_cause = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        left = self._config.rollout.max_replacements - self._num_replaced
        logging.warning("Instance %d is lost; replacements left: %d; %s", instance.instance_id, left, self._last_cause)
        if left > 0:
            self._num_replaced += 1
            self._start(instance.place, is_replacement=True)

    def _introduce(self) -> list[Any]:
        """Tell the instances of each other, of the draft servers and of the owners of their KV pool."""
        servers = [] if self._draft_servers is None else self._draft_servers.actors
        actors = {instance_id: instance.actor for instance_id, instance in self._instances.items()}
        pool = self._pool_owners
        owners = ({}, None) if pool is None else (pool.actors, pool.directory)
        return [actor.meet.remote(actors, servers, *owners) for actor in actors.values()]

    def _poll(self, instance: Instance) -> None:
        number, batches = instance.outbox.next_poll()
        if not self._chaos.drops_message():
            self._polls[instance.actor.poll.remote(number, batches)] = instance


def start_ray() -> None:
    """Join the cluster at `RAY_ADDRESS`, else one that runs on this machine already, else start Ray here."""
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=True)
