"""Signature of the draw from hidden states."""

import jax
from jaxtyping import Array, Float, Float32, Int32, UInt32

from kernels_pallas._dispatch import select
from kernels_pallas.tree_verify.layout import why_not_pallas_gpu
from kernels_pallas.tree_verify.pallas_tpu import tree_verify_pallas_tpu
from kernels_pallas.tree_verify.partials import Draws, all_combine, finish
from kernels_pallas.tree_verify.reference import tree_verify_reference
from kernels_pallas.tree_verify.xla import tree_verify_xla


def _pallas_gpu(*args):
    """Import Mosaic GPU where it is used."""
    from kernels_pallas.tree_verify.pallas_gpu import tree_verify_pallas_gpu

    return tree_verify_pallas_gpu(*args)


IMPLEMENTATIONS = {
    "xla": tree_verify_xla,
    "pallas_tpu": tree_verify_pallas_tpu,
    "pallas_gpu": _pallas_gpu,
    "reference": tree_verify_reference,
}
"""The TPU and GPU kernels have compiled and run in interpret mode, never on a TPU or GPU."""


def tree_verify(
    hidden: Float[Array, "E M"],
    head: Float[Array, "M V"],
    keys: UInt32[Array, "E 2"],
    positions: Int32[Array, "E"],
    temperature: Float32[Array, "E"],
    *,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> Draws:
    """Draw argmax(logits / temperature + gumbel(fold_in(key, position))) of every row, logits = hidden @ head.

    The random bits are those of `jax.random` with `jax_threefry_partitionable` (jax's default), whatever the
    implementation, the tiles and the shards, so that equal logits give equal tokens. Ties go to the lowest id. There is
    no top-k and no top-p: they need the sorted logits, and such rows take the path that has all of these.

    With `axis_name` the call stands inside `shard_map`, `head` is this shard's equal share of the columns in the order
    of the axis, and the shards combine with one all-reduce of 16 bytes per row and shard; the result is replicated.

    Args:
        hidden: Hidden states after the final norm.
        head: LM head; a tied embedding is passed transposed, which XLA fuses and the TPU kernel would copy.
        keys: Threefry key of each row's request.
        positions: Absolute position of the token to draw.
        temperature: 0, or less, takes the likeliest token.
        axis_name: Mesh axis over which the vocabulary is sharded.
        implementation: Name of an implementation; None chooses.

    Returns:
        Tokens, their log-probabilities and the log-sum-exps. Logits of -inf are never drawn while another is finite; a
        row that holds a NaN says the last token, with log-probability NaN.

    Raises:
        ValueError: If there is no implementation of that name, or the one that was named cannot serve these shapes.
    """
    refusals = {"pallas_gpu": why_not_pallas_gpu(hidden, head)}
    function = select("tree_verify", IMPLEMENTATIONS, implementation, refusals)
    vocab = head.shape[1]
    if axis_name is None:
        return finish(function(hidden, head, keys, positions, temperature, 0, vocab), vocab)
    first_id, vocab_size = jax.lax.axis_index(axis_name) * vocab, jax.lax.axis_size(axis_name) * vocab
    part = function(hidden, head, keys, positions, temperature, first_id, vocab_size)
    return finish(all_combine(part, axis_name), vocab_size)
