"""Shapes at which the draw is tested, compiled and measured."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One shape.

    Attributes:
        rows: Tokens drawn: requests, times 1 + drafts in a step that verifies.
        width: Of the hidden states.
        vocab: Tokens of the whole vocabulary.
        shards: Devices that share the vocabulary.
        dtype: Of hidden states and head.
    """

    rows: int
    width: int
    vocab: int
    shards: int = 1
    dtype: str = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes that a device must read and write: its share of the head, hidden states, keys, results; no logits."""
        head = self.width * (self.vocab // self.shards) * jnp.dtype(self.dtype).itemsize
        return head + self.rows * (self.width * jnp.dtype(self.dtype).itemsize + 16 + 12)

    @property
    def flops(self) -> int:
        """Operations of a device's share of the matmul."""
        return 2 * self.rows * self.width * (self.vocab // self.shards)

    def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `tree_verify` on one device."""
        return (
            jax.ShapeDtypeStruct((self.rows, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.width, self.vocab // self.shards), self.dtype),
            jax.ShapeDtypeStruct((self.rows, 2), jnp.uint32),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.float32),
        )


TINY = {
    "tiny_math": ArgSpec(rows=16, width=128, vocab=264, dtype="float32"),
    "one row": ArgSpec(rows=1, width=32, vocab=64, dtype="float32"),
    "several tiles": ArgSpec(rows=21, width=64, vocab=1300, dtype="float32"),
    "bfloat16": ArgSpec(rows=9, width=64, vocab=520),
}
MOONLIGHT = {f"moonlight tp{n}": ArgSpec(rows=256, width=2048, vocab=163_840, shards=n) for n in (1, 8)}
KIMI_K2 = {f"kimi_k2 tp{n}": ArgSpec(rows=256, width=7168, vocab=163_840, shards=n) for n in (1, 8)}
QWEN2_72B = {f"qwen2_72b tp{n}": ArgSpec(rows=256, width=8192, vocab=152_064, shards=n) for n in (1, 4)}
"""Not 8: a share of 19,008 is no multiple of 128, and XLA for TPU, which lays such a head out by columns, would copy it
for each call. A vocabulary that is padded to a multiple of 128 x shards is not copied."""
ARG_SPECS = TINY | MOONLIGHT | KIMI_K2 | QWEN2_72B
