"""Read and write checkpoint directories: `config.json` and safetensors files, whole or sharded."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from seer_jax.core.errors import ConfigError
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, decoder_specs
from seer_jax.weights.float8 import (
    SCALE_SUFFIX,
    STORED_TYPE,
    check_quantization,
    dequantise,
    read_float8,
    scale_shape,
)
from seer_jax.weights.hub_layout import from_hub, hub_shapes, to_hub

READABLE_TYPES = ("F32", "F16", "BF16")
"""Element types, in safetensors' spelling, that weights may be stored in."""


def load_checkpoint(
    path: str | Path, dtype: Any, *, keeps_float8_experts: bool = False
) -> tuple[DecoderConfig, Params]:
    """Read a checkpoint directory; every tensor must be there, nothing else, in the right shape.

    Args:
        path: Directory with `config.json` and `model.safetensors`, or its shards and their index.
        dtype: Type wanted for the weights (the router stays float32). What is stored in float8 is multiplied by its
            scales.
        keeps_float8_experts: Leave the routed experts in float8, with their scales, as `stack_expert` lays them out.

    Returns:
        The shape and the weights, as numpy arrays: the caller places them on devices.

    Raises:
        ConfigError: At `model.path`: the directory or a file is missing, or a tensor is missing, unexpected or of
            another shape or type than the configuration says. At `model.expert_dtype`: experts to be kept are not
            float8.
    """
    path = Path(path).expanduser()
    config = load_config(path)
    with ExitStack() as stack:
        files = {file: stack.enter_context(_open_weights(file)) for file in _weight_files(path)}
        names = {
            name: file
            for file, opened in files.items()
            for name in opened.offset_keys()
            if not name.endswith("rotary_emb.inv_freq")
        }
        file_of = {name: files[file] for name, file in names.items()}
        _check_tensors(path, hub_shapes(config), file_of)

        def read_blocks(name: str) -> tuple[np.ndarray, np.ndarray]:
            if name + SCALE_SUFFIX not in names:
                problem = f"is 'checkpoint', but {path} stores {name} as {file_of[name].get_slice(name).get_dtype()}"
                raise ConfigError("model.expert_dtype", problem, "give auto")
            return read_float8(names[name], name), file_of[name + SCALE_SUFFIX].get_tensor(name + SCALE_SUFFIX)

        def read(name: str) -> np.ndarray:
            return dequantise(*read_blocks(name)) if name + SCALE_SUFFIX in names else file_of[name].get_tensor(name)

        stored = from_hub(config, read, read_blocks if keeps_float8_experts else None)
    specs = decoder_specs(config, jnp.dtype(dtype), has_float8_experts=keeps_float8_experts)
    return config, jax.tree.map(lambda array, spec: np.ascontiguousarray(array, spec.dtype), stored, specs)


def load_config(path: str | Path) -> DecoderConfig:
    """Read `config.json` of a checkpoint directory.

    Raises:
        ConfigError: The file is missing, is not JSON, or describes a model that we do not have.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise ConfigError("model.path", f"{file} does not exist", "give a directory with a Hugging Face checkpoint")
    described = _read_json(file)
    # How weights are stored decides nothing of what is computed.
    if (quantization := described.pop("quantization_config", None)) is not None:
        check_quantization(quantization)
    return DecoderConfig.from_hf(described)


def save_checkpoint(path: str | Path, config: DecoderConfig, params: Params) -> None:
    """Write `config.json` and `model.safetensors` as Hugging Face transformers reads them."""
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    # safetensors writes the memory behind an array whatever its strides: make it contiguous first.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in to_hub(config, params).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    hf = config.to_hf() | {"dtype": str(params["embed"].dtype)}
    (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (path / name).is_file():
            raise ConfigError("model.path", f"{path / name} does not exist", "the checkpoint is incomplete")
    return [path / name for name in names]


def _open_weights(file: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ConfigError("model.path", f"{file} is not a safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError("model.path", f"{file} is not valid JSON: {error}") from error


def _check_tensors(path: Path, shapes: dict[str, tuple[int, ...]], file_of: dict[str, Any]) -> None:
    present = shapes.keys() & file_of.keys()
    scaled = [name for name in present if file_of[name].get_slice(name).get_dtype() == STORED_TYPE]
    shapes = shapes | {name + SCALE_SUFFIX: scale_shape(shapes[name]) for name in scaled}
    if missing := sorted(shapes.keys() - file_of.keys()):
        raise ConfigError("model.path", f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)", _FIT_HINT)
    if unexpected := sorted(file_of.keys() - shapes.keys()):
        raise ConfigError(
            "model.path",
            f"{path}: tensor {unexpected[0]} is not part of this model ({len(unexpected)} in all)",
            _FIT_HINT,
        )
    for name, shape in shapes.items():
        stored = file_of[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ConfigError(
                "model.path", f"{path}: tensor {name} is {stored.get_shape()}, not {list(shape)}", _FIT_HINT
            )
        if stored.get_dtype() not in READABLE_TYPES and name not in scaled:
            raise ConfigError(
                "model.path",
                f"{path}: tensor {name} is stored as {stored.get_dtype()}",
                f"only {', '.join(READABLE_TYPES)}, and {STORED_TYPE} with factors, can be read",
            )


_FIT_HINT = "config.json and the weights must belong together"
