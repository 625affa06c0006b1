"""The mesh of one instance or of the learner."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from seer_jax.config.schema import ShardingConfig
from seer_jax.core.errors import ConfigError

MESH_AXES = ("data", "expert", "tensor")
"""Outermost first: tensor parallelism talks most and gets the nearest neighbours."""


def make_mesh(config: ShardingConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Lay out the first data x expert x tensor of `devices`.

    Args:
        config: Size of each axis.
        devices: What this process may use; more than needed is fine.

    Returns:
        A mesh with Auto axes: the partitioner places collectives, the code names only parameters' axes.

    Raises:
        ConfigError: An axis is below 1, or there are too few devices.
    """
    shape = tuple(getattr(config, axis) for axis in MESH_AXES)
    for axis, size in zip(MESH_AXES, shape, strict=True):
        if size < 1:
            raise ConfigError(f"sharding.{axis}", f"must be at least 1, got {size}")
    needed = math.prod(shape)
    if needed > len(devices):
        product = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError("sharding", f"{product} needs {needed} devices, there are {len(devices)}", "lower an axis")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:needed])
