"""What all blocks share: RMSNorm and the SwiGLU MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seer_jax.models.specs import Params


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Scale to unit root mean square, computed in float32, then multiply by `weight` in the type of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def swiglu_mlp(params: Params, x: Float[Array, "T M"]) -> Float[Array, "T M"]:
    """Compute down(silu(gate x) * up x); `gate_up` holds gate then up."""
    gate, up = jnp.split(x @ params["gate_up"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ params["down"]
