"""Meshes, and the one table that says how logical axes lie on them."""

from seer_jax.sharding.mesh import MESH_AXES, make_mesh
from seer_jax.sharding.rules import WHOLE_EXPERTS, ShardingRules, check_divisible, shardings_for

__all__ = ["MESH_AXES", "WHOLE_EXPERTS", "ShardingRules", "check_divisible", "make_mesh", "shardings_for"]
