"""What the Hopper kernels share: layouts of registers and shared memory, and limits of the chip."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

WGMMA_ROWS = 64
"""Rows that a warpgroup multiplies at a time."""
SLAB = 64
"""Values of a row that lie together in shared memory: in bfloat16 128 bytes, swizzled as wgmma reads them."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); another number costs time, not correctness."""
COPY_REGISTERS = 24
"""Per thread of a warpgroup that only copies: the fewest that there can be."""
LAYOUT = plgpu.Layout.WGMMA
"""How a product lies in the registers of a warpgroup."""
BY_ROW = LAYOUT.reduce(1)
"""How a value for each of its rows does."""


def slabs(shape: tuple[int, ...], dtype: DTypeLike = jnp.bfloat16):
    """Shared memory for operands of wgmma, or for what `upcast` makes such operands of."""
    transforms = plgpu.TilingTransform((8, SLAB)), plgpu.SwizzleTransform(SLAB * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def divide_registers(computing: int, is_copying: bool) -> None:
    """Move registers from the warpgroup that copies to those that compute; each calls this first.

    Args:
        computing: Warpgroups that compute beside one that copies. One alone has as many as a thread can have.
        is_copying: Whether the caller is the one that copies.
    """
    if computing > 1:
        launched = 65_536 // (128 * (computing + 1)) // 8 * 8
        left = (launched * (computing + 1) - COPY_REGISTERS) // computing // 8 * 8
        if is_copying:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        else:
            plgpu.set_max_registers(left, action="increase")


def with_layout(x: jax.Array, layout, interpret) -> jax.Array:
    """Say how registers hold an array.

    Args:
        x: A constant, or what was just read from a reference.
        layout: How.
        interpret: What the kernel was given: the interpreter has no registers, and no rule for their layouts.
    """
    return x if interpret else plgpu.layout_cast(x, layout)


def upcast(source, target, interpret, scale: jax.Array | None = None) -> None:
    """Copy a matrix from float8 to bfloat16, both in shared memory.

    Args:
        source: Reference to float8_e4m3fn [64, k].
        target: Reference to bfloat16 [64, k].
        interpret: As in `with_layout`.
        scale: A float32 to multiply by before rounding; with None the values stay exact.
    """
    values = source[...] if interpret else plgpu.load(source, (), layout=plgpu.Layout.WGMMA_UPCAST_2X)
    values = values.astype(jnp.float32)  # Hopper has no direct conversion.
    target[...] = (values if scale is None else values * scale).astype(jnp.bfloat16)


def multiply_transposed(a, b, interpret) -> jax.Array:
    """Multiply a matrix by another's transpose, both in shared memory.

    Args:
        a: Reference to bfloat16 [64, k].
        b: Reference to bfloat16 [n, k].
        interpret: As in `with_layout`: the interpreter cannot transpose.

    Returns:
        float32 [64, n], in registers.
    """
    if interpret:
        return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, b.shape[0]), jnp.float32))


def accumulate(total: jax.Array, a: jax.Array, b, interpret) -> jax.Array:
    """Add a product to what registers hold.

    Args:
        total: float32 [64, n].
        a: bfloat16 [64, k], in registers.
        b: Reference to bfloat16 [k, n] in shared memory.
        interpret: As in `with_layout`: the interpreter has no wgmma of registers, and none onto what they hold.
    """
    if interpret:
        return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))
