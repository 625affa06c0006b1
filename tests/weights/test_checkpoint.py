"""Checkpoints survive the way in and out unchanged, and one that does not fit is refused with the tensor's name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seer_jax.core.errors import ConfigError
from seer_jax.models.specs import decoder_specs, init_params
from seer_jax.weights import load_checkpoint, save_checkpoint
from seer_jax.weights.hub_layout import hub_shapes
from tests.models.oracles import CASES, ORACLES


def copy_case(case, tmp_path):
    shutil.copytree(ORACLES / case, tmp_path / case)
    return tmp_path / case


def edit(path, change):
    """Rewrite the weights after `change(tensors)`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_export_restores_every_tensor_of_hugging_face_bit_for_bit(case, tmp_path):
    config, params = load_checkpoint(ORACLES / case, "float32")
    save_checkpoint(tmp_path, config, params)
    theirs, ours = (load_file(directory / "model.safetensors") for directory in (ORACLES / case, tmp_path))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    assert load_checkpoint(tmp_path, "float32")[0] == config


@pytest.mark.parametrize("case", CASES)
def test_imported_parameters_are_as_declared(case):
    config, params = load_checkpoint(ORACLES / case, "bfloat16")
    specs = decoder_specs(config, jnp.bfloat16)
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    for array, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs), strict=True):
        assert (array.shape, array.dtype) == (spec.shape, jnp.dtype(spec.dtype))
        assert array.flags.c_contiguous


def test_bfloat16_round_trip(tmp_path):
    config, _ = load_checkpoint(ORACLES / "k2", "float32")
    params = init_params(jax.random.key(0), decoder_specs(config, jnp.bfloat16))
    save_checkpoint(tmp_path, config, params)
    _, loaded = load_checkpoint(tmp_path, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(np.asarray, params))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_read_through_their_index(tmp_path):
    path = copy_case("moonlight", tmp_path)
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, path / shard)
    (path / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = load_checkpoint(ORACLES / "moonlight", "float32")
    config, params = load_checkpoint(path, "float32")
    assert config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    (path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.path: .*b\.safetensors does not exist"):
        load_checkpoint(path, "float32")


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    path = copy_case("moonlight", tmp_path)
    edit(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    load_checkpoint(path, "float32")


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing"),
        (lambda t: t.update(surprise=np.ones(3, np.float32)), "tensor surprise is not part of this model"),
        (lambda t: t.update({GATE: t[GATE][:, 1:]}), rf"tensor {GATE} is \[8, 47\], not \[8, 48\]"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int32)}), f"tensor {GATE} is stored as I32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_tensors_name(change, message, tmp_path):
    path = copy_case("moonlight", tmp_path)
    edit(path, change)
    with pytest.raises(ConfigError, match=rf"model\.path: .*{message}"):
        load_checkpoint(path, "float32")


def test_files_that_are_missing_or_broken_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: .*config\.json does not exist"):
        load_checkpoint(tmp_path / "nowhere", "float32")
    path = copy_case("moonlight", tmp_path)
    (path / "model.safetensors").write_bytes(b"nothing of the sort")
    with pytest.raises(ConfigError, match=r"model\.path: .*is not a safetensors file"):
        load_checkpoint(path, "float32")
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.path: .*is not valid JSON"):
        load_checkpoint(path, "float32")


def test_expected_tensors_follow_from_the_parameters():
    config, _ = load_checkpoint(ORACLES / "dsv3_grouped", "float32")
    shapes = hub_shapes(config)
    stored = load_file(ORACLES / "dsv3_grouped/model.safetensors")
    assert shapes == {name: tensor.shape for name, tensor in stored.items()}
