"""What the GPU kernel can serve."""

import jax.numpy as jnp


def why_not_pallas_gpu(hidden, head) -> str | None:
    """Say why the GPU kernel cannot serve these shapes, or None if it can.

    Args:
        hidden: Hidden states [E, M], or their ShapeDtypeStruct.
        head: LM head [M, V], or its ShapeDtypeStruct.

    Returns:
        The reason in a few words.
    """
    for name, array in (("hidden states", hidden), ("LM head", head)):
        if array.dtype != jnp.bfloat16:
            return f"{name}: {array.dtype}, not bfloat16"
    for name, size in zip(("width", "vocabulary"), head.shape, strict=True):
        if size % 64:
            return f"a {name} of {size} is no multiple of 64"
    return None
