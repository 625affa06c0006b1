"""Meshes and shardings that cannot be are refused by the name of the axis."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from seer_jax.config.schema import ShardingConfig
from seer_jax.core.errors import ConfigError
from seer_jax.models.specs import decoder_specs
from seer_jax.sharding import ShardingRules, make_mesh, shardings_for
from tests.models.oracles import load_case


def abstract_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in ("data", "expert", "tensor"))
    return AbstractMesh(shape, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_a_mesh_takes_the_devices_it_needs():
    mesh = make_mesh(ShardingConfig(), jax.devices())
    assert dict(mesh.shape) == {"data": 1, "expert": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match=r"sharding: data 2 x expert 3 x tensor 1 needs 6 devices, there are 1"):
        make_mesh(ShardingConfig(data=2, expert=3), jax.devices()[:1])


def test_an_axis_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"sharding\.tensor: must be at least 1, got 0"):
        make_mesh(ShardingConfig(tensor=0), jax.devices())


@pytest.mark.parametrize(("axis", "size", "what"), [("tensor", 8, "4 heads"), ("expert", 3, "8 experts")])
def test_a_model_that_does_not_divide_is_refused(axis, size, what):
    config, _, _ = load_case("moonlight")
    with pytest.raises(ConfigError, match=rf"sharding\.{axis}: {size} does not divide the model's {what}"):
        shardings_for(decoder_specs(config, jnp.float32), abstract_mesh(**{axis: size}))


def test_a_mesh_axis_used_twice_in_one_array_is_refused():
    assert ShardingRules().partition_spec(("experts", None, "expert_mlp")) == PartitionSpec("expert", None, "tensor")
    with pytest.raises(ConfigError, match="twice"):
        ShardingRules(expert_mlp="expert").partition_spec(("experts", None, "expert_mlp"))
