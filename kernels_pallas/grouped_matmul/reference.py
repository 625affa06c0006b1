"""Expert MLP, every expert over every token."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.blocks import dequantise_blocks


def grouped_mlp_reference(x, expert_ids, expert_weights, gate_up, down, gate_up_scale=None, down_scale=None):
    """See `grouped_mlp`. Computes all experts and weights those that were not chosen with zero."""
    if gate_up_scale is not None:
        gate_up = dequantise_blocks(gate_up, gate_up_scale, x.dtype)
        down = dequantise_blocks(down, down_scale, x.dtype)
    total = jnp.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        weight = jnp.sum(jnp.where(expert_ids == expert, expert_weights, 0.0), axis=1, keepdims=True)
        gate, up = jnp.split(x @ gate_up[expert], 2, axis=-1)
        total += weight.astype(x.dtype) * ((jax.nn.silu(gate) * up) @ down[expert])
    return total
