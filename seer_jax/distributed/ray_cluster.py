"""The cluster of instance actors, as the rollout loop sees it."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import Event, InstanceLost
from seer_jax.core.types import InstanceInfo, RequestChunk
from seer_jax.distributed.instance_actor import InstanceActor


class RayCluster:
    """Implements `engine.cluster.Cluster` over actors, one outstanding `poll` per instance."""

    def __init__(self, config: RunConfig, model_config: Any, params: Mapping[str, Any]) -> None:
        """Start Ray unless it runs, start the actors and wait until every engine is compiled.

        Args:
            config: The run; `rollout.instances` actors are started.
            model_config: The decoder's `DecoderConfig`.
            params: Weights as host arrays; travel once through the object store.
        """
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray()
        num_instances = config.rollout.instances
        platform = _platform()
        _check_resources(platform, config)
        weights = ray.put(params)
        actor_class = ray.remote(InstanceActor).options(max_concurrency=3, **_resources(platform, config))
        self._actors: dict[int, Any] = {}
        for i in range(num_instances):
            cores = _share_of_cores(i, num_instances) if platform == "cpu" else ()
            self._actors[i] = actor_class.remote(i, model_config, weights, config, cores)
        self.infos: list[InstanceInfo] = ray.get([actor.info.remote() for actor in self._actors.values()])
        self._polls = {actor.poll.remote(): i for i, actor in self._actors.items()}

    def start_iteration(self, policy_version: int, params: Mapping[str, Any] | None) -> None:
        """See `Cluster`. Weights go to the object store once, every node fetches them once."""
        weights = None if params is None else ray.put(params)
        ray.get([actor.start_iteration.remote(policy_version, weights) for actor in self._actors.values()])

    def send(self, chunks: Mapping[int, Sequence[RequestChunk]]) -> None:
        """See `Cluster`. Chunks sent to an instance that just died are reported lost with it."""
        for instance_id, batch in chunks.items():
            if instance_id in self._actors:
                self._actors[instance_id].send.remote(batch)

    def wait(self) -> list[Event]:
        """See `Cluster`. A dead actor yields `InstanceLost`."""
        ready, _ = ray.wait(list(self._polls), num_returns=1)
        events: list[Event] = []
        for ref in ready:
            instance_id = self._polls.pop(ref)
            try:
                events += ray.get(ref)
            except RayActorError:
                del self._actors[instance_id]
                events.append(InstanceLost(instance_id=instance_id))
            else:
                self._polls[self._actors[instance_id].poll.remote()] = instance_id
        return events

    def close(self) -> None:
        """Stop the actors, and Ray if this object started it."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._polls.clear()
        if self._owns_ray:
            ray.shutdown()


def start_ray() -> None:
    """Join the cluster that `RAY_ADDRESS` names, else start Ray on this machine."""
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=True)


def _platform() -> str:
    """What the actors run on: the accelerators that Ray's nodes report, unless JAX is told to use the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    return next((name.lower() for name in ("TPU", "GPU") if ray.cluster_resources().get(name, 0) >= 1), "cpu")


def _check_resources(platform: str, config: RunConfig) -> None:
    """Refuse instances that Ray could never place: it would wait for ever."""
    size, name = num_mesh_devices(config.sharding), platform.upper()
    available = int(ray.cluster_resources().get(name, 0))
    if platform != "cpu" and config.rollout.instances * size > available:
        raise ConfigError(
            "rollout.instances",
            f"{config.rollout.instances} instances of {size} {name}s need more than the cluster's {available}",
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


def _share_of_cores(instance_id: int, num_instances: int) -> list[int]:
    """An equal share of this machine's cores, disjoint while there are enough of them."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_instances)
    first = instance_id * share % len(cores)
    return cores[first : first + share]
