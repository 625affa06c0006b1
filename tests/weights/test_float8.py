"""Checkpoints in Kimi-K2's float8 format are the matrices that their values and factors multiply to."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kernels_pallas.grouped_matmul.blocks import dequantise_blocks, quantise_blocks
from seer_jax.config.schema import ModelSource, RunConfig
from seer_jax.config.validate import validate
from seer_jax.core.errors import ConfigError
from seer_jax.engine.engine import Engine
from seer_jax.models import decoder
from seer_jax.models.specs import decoder_specs, init_params
from seer_jax.weights import load_checkpoint, save_checkpoint
from tests.engine import tiny
from tests.models.oracles import ORACLES, load_case

QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
}  # fmt: skip
WIDE = dataclasses.replace(tiny.MODEL, hidden_size=160, moe_intermediate_size=144)
"""Two blocks each way, the second a partial one, so that a scale at a wrong place shows."""


def write_float8(source: Path, directory: Path) -> dict[str, np.ndarray]:
    """Write a checkpoint with every linear matrix in float8, as Kimi-K2's is; and its twin. Returns its tensors.

    The twin, in `directory`/twin, holds the products of values and factors in float32.
    """
    stored, products = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = products[name] = tensor
        if name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight"):
            values, scale = quantise_blocks(jnp.asarray(tensor))
            stored[name], stored[name + "_scale_inv"] = np.asarray(values), np.asarray(scale)
            products[name] = np.asarray(dequantise_blocks(values, scale, jnp.float32))
    described = json.loads((source / "config.json").read_text())
    for path, tensors, quantization in ((directory, stored, QUANTIZATION), (directory / "twin", products, None)):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(described | {"quantization_config": quantization}))
    return stored


@pytest.fixture(scope="module", params=["k2", "wide"])
def checkpoint(request, tmp_path_factory) -> Path:
    source, directory = ORACLES / "k2", tmp_path_factory.mktemp("float8")
    if request.param == "wide":
        source = directory / "source"
        save_checkpoint(source, WIDE, init_params(jax.random.key(0), decoder_specs(WIDE, jnp.float32)))
    write_float8(source, directory / "stored")
    return directory / "stored"


def test_weights_are_values_times_factors(checkpoint):
    config, params = load_checkpoint(checkpoint, "float32")
    twin_config, twin = load_checkpoint(checkpoint / "twin", "float32")
    assert config == twin_config
    jax.tree.map(np.testing.assert_array_equal, params, twin)


def test_rounding_to_float8_shows(tmp_path):
    """So the comparisons here would notice weights that were never rounded."""
    write_float8(ORACLES / "k2", tmp_path)
    exact, rounded = load_case("k2")[1], load_checkpoint(tmp_path, "float32")[1]
    difference = np.abs(np.asarray(exact["layers"][1]["moe"]["down"]) - rounded["layers"][1]["moe"]["down"]).max()
    assert difference > 1e-3


def test_experts_that_stay_float8_say_what_their_products_say(checkpoint):
    config, kept = load_checkpoint(checkpoint, "float32", keeps_float8_experts=True)
    specs = decoder_specs(config, jnp.float32, has_float8_experts=True)
    assert jax.tree.structure(kept) == jax.tree.structure(specs)
    for array, spec in zip(jax.tree.leaves(kept), jax.tree.leaves(specs), strict=True):
        assert (array.shape, array.dtype) == (spec.shape, jnp.dtype(spec.dtype))
    assert kept["layers"][1]["moe"]["gate_up"].dtype == jnp.float8_e4m3fn
    logits = []
    for params in (kept, load_checkpoint(checkpoint, "float32")[1]):
        params = jax.tree.map(jnp.asarray, params)
        hidden = decoder.forward_train(params, config, jnp.arange(3, 43, dtype=jnp.int32)[None])
        logits.append(decoder.project_logits(params, config, hidden))
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_an_engine_rolls_out_with_them(checkpoint):
    tokens = []
    for keeps in (True, False):
        config, params = load_checkpoint(checkpoint, "float32", keeps_float8_experts=keeps)
        engine = Engine(config, params, dataclasses.replace(tiny.CONFIG, deterministic=True))
        engine.submit(tiny.chunk(tiny.prompt(0, 9)))
        [event] = tiny.drain(engine).values()
        tokens.append((event.token_ids, event.logprobs))
        engine.close()
    np.testing.assert_array_equal(tokens[0][0], tokens[1][0])
    np.testing.assert_allclose(tokens[0][1], tokens[1][1], atol=1e-4)


ON_FOUR_DEVICES = """
import dataclasses, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from pathlib import Path
from seer_jax.config.schema import ShardingConfig
from seer_jax.engine.engine import Engine
from seer_jax.sharding import make_mesh
from seer_jax.weights import load_checkpoint
from tests.engine import tiny

config, params = load_checkpoint(Path(sys.argv[1]), "float32", keeps_float8_experts=True)
results, engine_config = [], dataclasses.replace(tiny.CONFIG, kv_dtype=sys.argv[2])
for sharding in (ShardingConfig(expert=2, tensor=2), ShardingConfig(data=2, tensor=2), None):
    mesh = None if sharding is None else make_mesh(sharding, jax.devices())
    engine = Engine(config, params, engine_config, mesh=mesh)
    engine.submit(tiny.chunk(tiny.prompt(0, 9)))
    [event] = tiny.drain(engine).values()
    results.append((event.token_ids, event.logprobs))
    if mesh is not None:
        moe = engine.params["layers"][1]["moe"]
        for name in ("gate_up", "gate_up_scale", "down", "down_scale"):
            assert moe[name].addressable_shards[0].data.shape[0] == config.n_routed_experts // 4, name
for tokens, logprobs in results[:2]:
    np.testing.assert_array_equal(tokens, results[2][0])
    np.testing.assert_allclose(logprobs, results[2][1], atol=1e-4)
"""


@pytest.mark.parametrize("kv_dtype", ["auto", "float8_e4m3fn"])
def test_devices_and_ranks_share_float8_experts_and_their_scales(tmp_path, kv_dtype):
    save_checkpoint(
        tmp_path / "source", tiny.MODEL, init_params(jax.random.key(0), decoder_specs(tiny.MODEL, "float32"))
    )
    write_float8(tmp_path / "source", tmp_path)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", ON_FOUR_DEVICES, tmp_path, kv_dtype]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]


def change_config(path, **fields):
    described = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(described | fields))


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.expert_dtype: .*experts\.0\.gate_proj\.weight as F32"):
        load_checkpoint(ORACLES / "k2", "float32", keeps_float8_experts=True)
    tensors = write_float8(ORACLES / "k2", tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    save_file(tensors | {name: tensors[name][:, :0]}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"tensor {name} is \[1, 0\], not \[1, 1\]"):
        load_checkpoint(tmp_path, "float32")
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"tensor {name} is missing"):
        load_checkpoint(tmp_path, "float32")
    change_config(tmp_path, quantization_config=QUANTIZATION | {"weight_block_size": [64, 64]})
    with pytest.raises(ConfigError, match=r"quantization_config\.weight_block_size: \[64, 64\] is not supported"):
        load_checkpoint(tmp_path, "float32")


def test_training_with_float8_experts_is_refused():
    config = RunConfig(model=ModelSource(expert_dtype="checkpoint"))
    validate(config, training=False)
    with pytest.raises(ConfigError, match=r"model\.expert_dtype: is 'checkpoint', but training"):
        validate(config, training=True)
