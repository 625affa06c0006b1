"""Float8 weights of a checkpoint, as Kimi-K2 and DeepSeek-V3 have them: e4m3 with a float32 factor per 128 x 128 block.

W = values x `weight_scale_inv` of their block, a factor in spite of its name.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kernels_pallas.grouped_matmul.blocks import BLOCK, num_blocks
from seer_jax.core.errors import ConfigError

STORED_TYPE = "F8_E4M3"
"""In safetensors' spelling."""
SCALE_SUFFIX = "_scale_inv"
"""Behind the name of a weight, the name of its factors."""
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
"""What `quantization_config` must say of the weights; how activations would be rounded is of no matter here."""


def check_quantization(quantization: Mapping[str, Any]) -> None:
    """Check `quantization_config` of a `config.json`.

    Raises:
        ConfigError: It describes another format.
    """
    for field, value in QUANTIZATION.items():
        if quantization.get(field) != value:
            problem = f"{quantization.get(field)!r} is not supported"
            raise ConfigError(f"model.config.quantization_config.{field}", problem, f"only {value!r} is")


def read_float8(file: Path, name: str) -> np.ndarray:
    """Read a float8_e4m3fn tensor; numpy has no such type, and so safetensors no array of it.

    Args:
        file: A safetensors file.
        name: Of a tensor in it that is stored as `STORED_TYPE`.
    """
    start, entries = _read_header(file, file.stat().st_mtime_ns)
    entry = entries[name]
    first, end = entry["data_offsets"]
    with file.open("rb") as stream:
        stream.seek(start + first)
        data = stream.read(end - first)
    return np.frombuffer(data, ml_dtypes.float8_e4m3fn).reshape(entry["shape"])


@lru_cache(maxsize=128)  # Kimi-K2 has 61 files of a thousand tensors.
def _read_header(file: Path, modified_ns: int) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and what it says of its tensors; anew when the file has changed."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return 8 + size, json.loads(stream.read(size))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the factors of a matrix; its last blocks may be partial."""
    return tuple(map(num_blocks, shape))


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Multiply values by their factors, in float32."""
    rows, columns = values.shape
    spread = np.repeat(np.repeat(scale, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    return values.astype(np.float32) * spread


def pad_to_blocks(size: int) -> int:
    """The next multiple of a block's width."""
    return num_blocks(size) * BLOCK


def stack_expert(
    gate: tuple[np.ndarray, np.ndarray], up: tuple[np.ndarray, np.ndarray], down: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """Lay out one expert as `grouped_mlp` takes it in float8.

    Gate and up lie beside each other and each has blocks of its own, so the expert's width is padded to whole blocks:
    columns and rows of zeros, which add nothing.

    Args:
        gate: Values [F, M] and factors, in the checkpoint's layout.
        up: Likewise.
        down: Likewise, [M, F].

    Returns:
        `gate_up` [M, 2 padded F], `down` [padded F, M] and their factors, `gate_up_scale` and `down_scale`.
    """
    width = down[0].shape[1]
    padded = pad_to_blocks(width)

    def pad_rows(values: np.ndarray) -> np.ndarray:
        whole = np.zeros((padded, values.shape[1]), values.dtype)
        whole[:width] = values
        return whole

    return {
        "gate_up": np.concatenate([pad_rows(gate[0]), pad_rows(up[0])]).T,
        "gate_up_scale": np.concatenate([gate[1], up[1]]).T,
        "down": pad_rows(down[0].T),
        "down_scale": down[1].T,
    }
