"""Rotary position embedding with YaRN.

Our q and kv projections carry the rotated dimensions as [first of every pair | second of every pair]; checkpoints
interleave the pairs and `seer_jax.weights` reorders them on the way in and out. So rotation needs no strided access.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seer_jax.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Compute the angle per position of each of the R/2 pairs; YaRN divides the slow ones by its factor.

    YaRN (arXiv 2309.00071) section 3.2: pairs that turn more than `beta_fast` times within the original length are
    kept, those below `beta_slow` turns are stretched, a linear ramp lies between.
    """
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies.astype(np.float32)

    def pair_index(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_index(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return (frequencies / yarn.factor * ramp + frequencies * (1.0 - ramp)).astype(np.float32)


def rotation(
    config: DecoderConfig, positions: Int[Array, " T"]
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Return (cos, sin) of every token's angles, float32 [T, R/2]."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    yarn = config.rope_scaling
    magnitude = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim) if yarn else 1.0
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(
    x: Float[Array, "T ... R"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T ... R"]:
    """Turn the pairs (x[j], x[j + R/2]) by their angles; axes between T and R (heads) share them."""
    between = (slice(None),) + (None,) * (x.ndim - 2)
    cos, sin = cos[between], sin[between]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
