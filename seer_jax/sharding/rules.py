"""Logical axis -> mesh axis, the whole sharding of a model in one table."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from seer_jax.config.schema import ShardingConfig
from seer_jax.core.errors import ConfigError
from seer_jax.sharding.mesh import MESH_AXES


@runtime_checkable
class Declaration(Protocol):
    """What sharding needs to know of a parameter; `seer_jax.models.specs.ParamSpec` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        ...

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """A field of `ShardingRules` per axis; None for axes that are never split."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axis, or axes, of each logical axis; None = every device holds all of it."""

    vocab: str | None = "tensor"
    """Rows of the embedding, columns of the LM head."""
    heads: str | None = "tensor"
    """Attention heads; the latent cache is shared by all heads and not split."""
    mlp: str | None = "tensor"
    """Width of dense MLPs and of the shared expert."""
    experts: str | tuple[str, ...] | None = "expert"
    """Routed experts."""
    expert_mlp: str | None = "tensor"
    """Width of each routed expert."""

    def partition_spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """Translate the axes of one array.

        Raises:
            ConfigError: Two of its axes lie on the same mesh axis.
        """
        mesh_axes = [None if axis is None else getattr(self, axis) for axis in logical_axes]
        used = [name for axis in mesh_axes if axis is not None for name in _names(axis)]
        if len(set(used)) < len(used):
            raise ConfigError("sharding.rules", f"{logical_axes} would use a mesh axis twice: {mesh_axes}")
        return PartitionSpec(*mesh_axes)


WHOLE_EXPERTS = ShardingRules(experts=("data", "expert", "tensor"), expert_mlp=None)
"""For code that names its collectives: a device holds whole experts, and all devices hold different ones. Half of the
columns of a fused `gate_up` would be all gates, and kernels want widths that are multiples of 128 (Moonlight's 1408 is
not one by halves)."""


def shardings_for(specs: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules | None = None) -> Any:
    """Return a `NamedSharding` for every parameter.

    Args:
        specs: Tree of parameter declarations.
        mesh: The mesh; an abstract one serves to check.
        rules: The table; None takes the defaults.

    Returns:
        A tree like `specs`, for `jax.device_put` or `jax.jit`.

    Raises:
        ConfigError: A dimension does not divide by the mesh axis it lies on; names the axis.
    """
    rules = rules or ShardingRules()

    def sharding(spec: Declaration) -> NamedSharding:
        partition = rules.partition_spec(spec.logical_axes)
        for size, logical, mesh_axis in zip(spec.shape, spec.logical_axes, partition, strict=True):
            names = [name for name in _names(mesh_axis or ()) if mesh.shape[name] > 1]
            ways = math.prod(mesh.shape[name] for name in names)
            if size % ways:
                product = "" if len(names) == 1 else f" ({' x '.join(names)})"
                raise ConfigError(
                    f"sharding.{names[0]}",
                    f"{ways}{product} does not divide the model's {size} {logical}",
                    f"use a divisor of {size}",
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map(sharding, specs)


def _names(mesh_axes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes


def check_divisible(config: ShardingConfig, specs: Any) -> None:
    """Check that an engine can divide a model over a mesh, without its devices.

    Args:
        config: Size of each axis, at least 1.
        specs: Tree of parameter declarations.

    Raises:
        ConfigError: As `shardings_for`.
    """
    shardings_for(specs, AbstractMesh(tuple(getattr(config, axis) for axis in MESH_AXES), MESH_AXES), WHOLE_EXPERTS)
