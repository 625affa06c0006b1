"""Meshes, and the one table that says how logical axes lie on them."""

from seer_jax.sharding.mesh import make_mesh
from seer_jax.sharding.rules import ShardingRules, shardings_for

__all__ = ["ShardingRules", "make_mesh", "shardings_for"]
