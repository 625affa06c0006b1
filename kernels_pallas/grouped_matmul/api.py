"""Signature of the expert MLP."""

from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import select
from kernels_pallas.grouped_matmul.reference import grouped_mlp_reference
from kernels_pallas.grouped_matmul.xla import grouped_mlp_xla

IMPLEMENTATIONS = {"xla": grouped_mlp_xla, "reference": grouped_mlp_reference}


def grouped_mlp(
    x: Float[Array, "T M"],
    expert_ids: Int[Array, "T K"],
    expert_weights: Float[Array, "T K"],
    gate_up: Float[Array, "E M F2"],
    down: Float[Array, "E F M"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T M"]:
    """Sum over each token's experts of weight * down(silu(gate x) * up x); differentiable in all but the ids.

    Exact: no expert has a capacity, no token is dropped.

    Args:
        x: Tokens.
        expert_ids: Distinct experts of each token.
        expert_weights: Their weights.
        gate_up: Gate then up matrix of each expert, F2 = 2 F columns.
        down: Down matrix of each expert.
        implementation: Name of an implementation; None chooses.

    Returns:
        The weighted sums.
    """
    function = select("grouped_mlp", IMPLEMENTATIONS, implementation)
    return function(x, expert_ids, expert_weights, gate_up, down)
