"""Signature of the expert MLP."""

from jaxtyping import Array, Float, Float32, Int

from kernels_pallas._dispatch import select
from kernels_pallas.grouped_matmul.layout import why_not_pallas_gpu, why_not_pallas_tpu
from kernels_pallas.grouped_matmul.reference import grouped_mlp_reference
from kernels_pallas.grouped_matmul.xla import grouped_mlp_xla


def _pallas_tpu(*args, **options):
    """Import Pallas when it is used: it takes half a second."""
    from kernels_pallas.grouped_matmul.pallas_tpu import grouped_mlp_pallas_tpu

    return grouped_mlp_pallas_tpu(*args, **options)


def _pallas_gpu(*args, **options):
    """Import Mosaic GPU where it is used."""
    from kernels_pallas.grouped_matmul.pallas_gpu import grouped_mlp_pallas_gpu

    return grouped_mlp_pallas_gpu(*args, **options)


IMPLEMENTATIONS = {
    "xla": grouped_mlp_xla,
    "reference": grouped_mlp_reference,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}


def grouped_mlp(
    x: Float[Array, "T M"],
    expert_ids: Int[Array, "T K"],
    expert_weights: Float[Array, "T K"],
    gate_up: Float[Array, "E M F2"],
    down: Float[Array, "E F M"],
    gate_up_scale: Float32[Array, "E blocks_m blocks_f2"] | None = None,
    down_scale: Float32[Array, "E blocks_f blocks_m"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "T M"]:
    """Sum over each token's experts of weight * down(silu(gate x) * up x).

    Exact: no expert has a capacity, no token is dropped. Differentiable in all but the ids if the weights are not
    quantised; `pallas_tpu` and `pallas_gpu` have no gradient.

    Args:
        x: Tokens.
        expert_ids: Distinct experts of each token; E, which is none, adds nothing and may be repeated.
        expert_weights: Their weights.
        gate_up: Gate then up matrix of each expert, F2 = 2 F columns.
        down: Down matrix of each expert.
        gate_up_scale: Scales of the 128 x 128 blocks of `gate_up`, if that is float8_e4m3fn (`quantise_blocks`).
        down_scale: Likewise of `down`; both or neither.
        implementation: Name of an implementation; None chooses by platform.

    Returns:
        The weighted sums.

    Raises:
        ValueError: If there is no implementation of that name, the one that was named cannot serve these shapes, or
            only one scale is given.
    """
    if (gate_up_scale is None) != (down_scale is None):
        raise ValueError("grouped_mlp: give the scales of both matrices or of neither")
    refusals = {
        "pallas_tpu": why_not_pallas_tpu(x, gate_up, down, gate_up_scale),
        "pallas_gpu": why_not_pallas_gpu(x, gate_up, down, gate_up_scale),
    }
    function = select("grouped_mlp", IMPLEMENTATIONS, implementation, refusals)
    return function(x, expert_ids, expert_weights, gate_up, down, gate_up_scale, down_scale)
