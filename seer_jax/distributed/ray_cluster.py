"""The cluster of instance actors, as the rollout loop sees it."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.core.errors import ConfigError, InstanceLostError, SeerError
from seer_jax.core.events import Event, InstanceLost
from seer_jax.core.types import InstanceInfo, RequestChunk
from seer_jax.distributed.draft_sync import DraftServers
from seer_jax.distributed.instance_actor import MAX_CONCURRENCY, InstanceActor

JAX_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
"""Modules of which one must be installed for JAX to use the accelerator."""
FLUSH_TIMEOUT_S = 30.0


class RayCluster:
    """Implements `engine.cluster.Cluster` over actors.

    At most one `poll` per instance is outstanding; what answers a poll's events travels with the next poll, because
    every Ray call costs about two milliseconds of CPU in all.
    """

    def __init__(self, config: RunConfig, model_config: Any, params: Mapping[str, Any]) -> None:
        """Start Ray unless it runs, start the actors and wait until every engine is compiled.

        Args:
            config: The run; `rollout.instances` actors are started.
            model_config: The decoder's `DecoderConfig`.
            params: Weights as host arrays; travel once through the object store.

        Raises:
            ConfigError: If the cluster cannot hold the instances, or an engine cannot be built.
        """
        self._config = config
        self._owns_ray = not ray.is_initialized()
        self._actors: dict[int, Any] = {}
        self._polls: dict[Any, int] = {}
        self._draft_servers: DraftServers | None = None
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            if self._owns_ray:
                start_ray()
            platform = _platform()
            _check_resources(platform, config)
            weights = ray.put(params)
            actor_class = ray.remote(InstanceActor).options(
                max_concurrency=MAX_CONCURRENCY, **_resources(platform, config)
            )
            self._actors.update((i, actor_class.remote()) for i in range(config.rollout.instances))
            self.infos = _get_infos(
                [
                    actor.start.remote(i, model_config, weights, config, platform == "cpu")
                    for i, actor in self._actors.items()
                ]
            )
            if config.speculation.mode in ("grouped", "grouped_tree"):
                speculation = config.speculation
                self._draft_servers = DraftServers(speculation.draft_servers, speculation.memory_tokens)
            ray.get(self._introduce())
            on_failure.pop_all()

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Cluster`. Weights go to the object store once, every node fetches them once."""
        if self._draft_servers is not None:
            if self._config.speculation.memory_tokens and self._actors:
                flushed = [actor.flush_drafts.remote() for actor in self._actors.values()]
                ray.wait(flushed, num_returns=len(flushed), timeout=FLUSH_TIMEOUT_S)
            self._draft_servers.start_epoch(policy_version)
            self._introduce()  # An instance that gave a server up, or that of a new one, hears of it again.
        weights = None if params is None else ray.put(params)
        started = {i: actor.start_iteration.remote(policy_version, weights) for i, actor in self._actors.items()}
        for instance_id, ref in started.items():
            try:
                ray.get(ref)
            except RayActorError:
                # Dead, or out of reach and then without these weights; its poll fails, and `wait` reports the loss.
                ray.kill(self._actors[instance_id])

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """See `Cluster`. Chunks sent to an instance that just died are reported lost with it."""
        for instance_id, batch in chunks.items():
            if instance_id in self._polls.values():
                self._actors[instance_id].send.remote(batch)
            elif instance_id in self._actors:
                self._poll(instance_id, batch)

    def wait(self) -> list[Event]:
        """See `Cluster`. A dead actor, or one whose events are lost, yields `InstanceLost`.

        Raises:
            InstanceLostError: If the loss of every instance has been reported already.
        """
        if not self._actors:
            raise InstanceLostError("all instances are lost")
        for instance_id in self._actors.keys() - self._polls.values():
            self._poll(instance_id, [])
        (ref,), _ = ray.wait(list(self._polls), num_returns=1)
        instance_id = self._polls.pop(ref)
        try:
            events = ray.get(ref)
        except (RayActorError, ObjectLostError):
            ray.kill(self._actors.pop(instance_id))
            self.infos = [info for info in self.infos if info.instance_id != instance_id]
            return [InstanceLost(instance_id=instance_id)]
        return events

    def close(self) -> None:
        """Stop the actors, and Ray if this object started it."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._polls.clear()
        if self._draft_servers is not None:
            self._draft_servers.close()
        if self._owns_ray:
            ray.shutdown()

    def _introduce(self) -> list[Any]:
        """Tell the instances of each other and of the draft servers."""
        servers = [] if self._draft_servers is None else self._draft_servers.actors
        return [actor.meet.remote(self._actors, servers) for actor in self._actors.values()]

    def _poll(self, instance_id: int, chunks: Sequence[RequestChunk]) -> None:
        self._polls[self._actors[instance_id].poll.remote(chunks)] = instance_id


def start_ray() -> None:
    """Join the cluster at `RAY_ADDRESS`, else one that runs on this machine already, else start Ray here."""
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=True)


def _get_infos(started: Sequence[Any]) -> list[InstanceInfo]:
    """Wait until every engine is ready; raises our errors as themselves, not wrapped in Ray's."""
    try:
        return ray.get(list(started))
    except RayTaskError as error:
        if isinstance(error.cause, SeerError):
            raise error.cause from error
        raise


def _platform() -> str:
    """What the actors run on: an accelerator that Ray's nodes report and the JAX installed here can use, else the CPU.

    `JAX_PLATFORMS=cpu` forces the CPU.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        for platform, plugins in JAX_PLUGINS.items():
            if ray.cluster_resources().get(platform.upper(), 0) >= 1 and any(map(find_spec, plugins)):
                return platform
    return "cpu"


def _check_resources(platform: str, config: RunConfig) -> None:
    """Refuse instances that the nodes could not hold even when idle, each on one node: Ray would wait for ever."""
    if platform == "cpu":
        return
    size, name = num_mesh_devices(config.sharding), platform.upper()
    per_node = [int(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]]
    num_fitting = sum(available // size for available in per_node)
    if config.rollout.instances > num_fitting:
        raise ConfigError(
            "rollout.instances" if num_fitting else "sharding",
            f"{config.rollout.instances} instances of {size} {name}s, each on one node, do not fit nodes of {per_node}",
            "lower rollout.instances or an axis of sharding",
        )


def _resources(platform: str, config: RunConfig) -> dict[str, Any]:
    """What an actor reserves: its mesh's accelerators, or its share of the cores."""
    num_devices = num_mesh_devices(config.sharding)
    match platform:
        case "gpu":
            return {"num_gpus": num_devices}
        case "tpu":
            return {"resources": {"TPU": num_devices}}
        case _:
            return {"num_cpus": min(1.0, ray.cluster_resources().get("CPU", 1.0) / config.rollout.instances)}
