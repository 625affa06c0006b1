"""What the TPU and GPU kernels can serve."""

import jax.numpy as jnp

from kernels_pallas.grouped_matmul.blocks import BLOCK, QUANTISED

LANES = 128


def why_not_pallas_tpu(x, gate_up, down, gate_up_scale=None) -> str | None:
    """Say why the TPU kernels cannot serve these shapes, or None if they can.

    Args:
        x: Tokens [T, M], or their ShapeDtypeStruct.
        gate_up: Gate and up matrices [E, M, 2 F], or their ShapeDtypeStruct.
        down: Down matrices [E, F, M], or their ShapeDtypeStruct.
        gate_up_scale: Scales of `gate_up`, or None.

    Returns:
        The reason in a few words.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"tokens are {x.dtype}, not float32 or bfloat16"
    return _why_not_experts(x, gate_up, down, gate_up_scale)


def why_not_pallas_gpu(x, gate_up, down, gate_up_scale=None) -> str | None:
    """Say why the GPU kernels cannot serve these shapes, or None if they can; arguments as in `why_not_pallas_tpu`."""
    if x.dtype != jnp.bfloat16:
        return f"tokens are {x.dtype}, not bfloat16"
    return _why_not_experts(x, gate_up, down, gate_up_scale)


def _why_not_experts(x, gate_up, down, gate_up_scale) -> str | None:
    expected = x.dtype if gate_up_scale is None else QUANTISED
    for weights in (gate_up, down):
        if weights.dtype != expected:
            return f"experts are {weights.dtype}, not {jnp.dtype(expected)}"
    _, ffn, model = down.shape
    for width, what in ((model, "the model"), (ffn, "an expert")):
        if width % LANES:
            return f"{what} is {width} wide, no multiple of {LANES}"
    return None


assert BLOCK == LANES
