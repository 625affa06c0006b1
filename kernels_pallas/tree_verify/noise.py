"""Gumbel noise with the very bits of `jax.random`, as integer arithmetic that runs inside a kernel.

`jax.random.gumbel(jax.random.fold_in(key, position), (vocab,))[i]` under `jax_threefry_partitionable` (jax's default)
is a function of key, position and i alone: Threefry-2x32 with 20 rounds of the counter (0, i), its two words xored.
All arithmetic is on int32, which wraps as uint32 does and is what the vector units of a TPU have.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
"""Constant of the third key word in the definition of Threefry."""


def threefry(key0: Array, key1: Array, count0: Array, count1: Array) -> tuple[Array, Array]:
    """Threefry-2x32-20 of counters under keys, all int32 and broadcast against each other."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.int32(PARITY))
    x0, x1 = count0 + key0, count1 + key1
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ _rotate_left(x1, distance)
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.int32(group + 1)
    return x0, x1


def fold_in(keys: UInt32[Array, "E 2"], positions: Int32[Array, "E"]) -> tuple[Int32[Array, "E"], Int32[Array, "E"]]:
    """Both words of `jax.random.fold_in(key, position)` of every row, as int32."""
    words = jax.lax.bitcast_convert_type(keys, jnp.int32)
    return threefry(words[:, 0], words[:, 1], jnp.zeros_like(positions), positions)


def gumbel(key0: Int32[Array, "..."], key1: Int32[Array, "..."], ids: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """Noise of the token ids under folded keys, broadcast against each other; between -4.5 and 16."""
    x0, x1 = threefry(key0, key1, jnp.zeros_like(ids), ids)
    # 23 random bits as the mantissa of a number in [1, 2).
    one = jnp.int32(0x3F800000)
    mantissa = jax.lax.shift_right_logical(x0 ^ x1, jnp.int32(9)) | one
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def _rotate_left(x: Array, distance: int) -> Array:
    return (x << jnp.int32(distance)) | jax.lax.shift_right_logical(x, jnp.int32(32 - distance))
