"""What instances run on, what their actors reserve, and what their calls raise."""

import os
from importlib.util import find_spec
from typing import Any

import jax
import ray
from ray.exceptions import RayError, RayTaskError

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.core.errors import ConfigError, SeerError

JAX_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
"""Modules of which one must be installed for JAX to use the accelerator."""
MISTAKES = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")
"""What XLA says of programs that no other instance could run either."""


def find_platform() -> str:
    """What the actors run on: an accelerator that Ray's nodes report and the JAX installed here can use, else the CPU.

    `JAX_PLATFORMS=cpu` forces the CPU.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        for platform, plugins in JAX_PLUGINS.items():
            if ray.cluster_resources().get(platform.upper(), 0) >= 1 and any(map(find_spec, plugins)):
                return platform
    return "cpu"


def check_resources(platform: str, config: RunConfig) -> None:
    """Refuse instances that the nodes could not hold even when idle, each on one node: Ray would wait for ever.

    Instances that may join later are left out: their nodes may come with them.
    """
    if platform == "cpu":
        return
    needed, setting = min_instances(config), "min_instances" if config.rollout.min_instances else "instances"
    size, name = num_mesh_devices(config.sharding), platform.upper()
    per_node = [int(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]]
    num_fitting = sum(available // size for available in per_node)
    if needed > num_fitting:
        raise ConfigError(
            f"rollout.{setting}" if num_fitting else "sharding",
            f"{needed} instances of {size} {name}s, each on one node, do not fit nodes of {per_node}",
            f"lower rollout.{setting} or an axis of sharding",
        )


def min_instances(config: RunConfig) -> int:
    """Instances without which no rollout begins."""
    return config.rollout.min_instances or config.rollout.instances


def actor_resources(platform: str, config: RunConfig) -> dict[str, Any]:
    """What an actor reserves: its mesh's accelerators, or its share of the cores."""
    num_devices = num_mesh_devices(config.sharding)
    match platform:
        case "gpu":
            return {"num_gpus": num_devices}
        case "tpu":
            return {"resources": {"TPU": num_devices}}
        case _:
            return {"num_cpus": min(1.0, ray.cluster_resources().get("CPU", 1.0) / config.rollout.instances)}


def get_result(ref: Any, timeout_s: float | None = None) -> Any:
    """Get what a call returned; our errors are raised as themselves, not wrapped in Ray's."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, SeerError):
            raise error.cause from error
        raise


def is_loss(error: RayError) -> bool:
    """Whether a failed call means that its instance is gone; if not, it is a mistake, and the run ends with it."""
    if not isinstance(error, RayTaskError):
        return True
    is_device = isinstance(error.cause, jax.errors.JaxRuntimeError)
    return is_device and not any(status in str(error.cause) for status in MISTAKES)
