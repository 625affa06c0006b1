"""Weights in float8 with a float32 scale per block of 128 x 128, as Kimi-K2 and DeepSeek-V3 store them."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32

BLOCK = 128
"""Rows and columns that share a scale."""
QUANTISED = jnp.float8_e4m3fn
MAX_QUANTISED = 448.0
"""Largest float8_e4m3fn."""


def num_blocks(size: int) -> int:
    """Count the blocks of an axis; its last one may be partial."""
    return -(-size // BLOCK)


def quantise_blocks(
    weights: Float[Array, "*E R C"],
) -> tuple[Float8e4m3fn[Array, "*E R C"], Float32[Array, "*E blocks_r blocks_c"]]:
    """Scale every block so that its largest magnitude becomes the largest float8, and round.

    Args:
        weights: Matrices, finite.

    Returns:
        The rounded matrices and the scales; weights are near values * scale. A block of zeros has scale 1.
    """
    *experts, rows, columns = weights.shape
    blocks_r, blocks_c = num_blocks(rows), num_blocks(columns)
    padding = [(0, 0)] * len(experts) + [(0, blocks_r * BLOCK - rows), (0, blocks_c * BLOCK - columns)]
    blocked = jnp.pad(jnp.abs(weights.astype(jnp.float32)), padding)
    peak = jnp.max(blocked.reshape(*experts, blocks_r, BLOCK, blocks_c, BLOCK), axis=(-3, -1))
    scale = jnp.where(peak > 0, peak / MAX_QUANTISED, 1.0)
    scaled = weights.astype(jnp.float32) / _spread(scale, rows, columns)
    return jnp.clip(scaled, -MAX_QUANTISED, MAX_QUANTISED).astype(QUANTISED), scale


def dequantise_blocks(values: Array, scale: Float32[Array, "*E blocks_r blocks_c"], dtype: DTypeLike) -> Array:
    """Undo `quantise_blocks`.

    Args:
        values: Matrices [*E, R, C] in float8.
        scale: Their scales.
        dtype: Of the result.

    Returns:
        values * scale, multiplied in float32.
    """
    return (values.astype(jnp.float32) * _spread(scale, *values.shape[-2:])).astype(dtype)


def _spread(scale: jax.Array, rows: int, columns: int) -> jax.Array:
    """Repeat every scale over its block."""
    by_row = jnp.repeat(scale, BLOCK, axis=-2)[..., :rows, :]
    return jnp.repeat(by_row, BLOCK, axis=-1)[..., :columns]
