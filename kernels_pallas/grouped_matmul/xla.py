"""Expert MLP in plain XLA: `ragged_dot` on accelerators, a loop over tiles of one expert's tokens on CPU.

On CPU the loop beats computing all experts (2x at 16 tokens of 2 of 8 experts), batches of fixed capacity (inexact, or
as slow) and `ragged_dot` (3x slower). Measured with `scripts/bench_kernels.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.blocks import dequantise_blocks


def grouped_mlp_xla(x, expert_ids, expert_weights, gate_up, down, gate_up_scale=None, down_scale=None):
    """See `grouped_mlp`."""
    arrays = (x, expert_ids, expert_weights, gate_up, down, gate_up_scale, down_scale)
    return jax.lax.platform_dependent(*arrays, cpu=grouped_mlp_tiles, default=grouped_mlp_ragged)


def grouped_mlp_ragged(x, expert_ids, expert_weights, gate_up, down, gate_up_scale=None, down_scale=None):
    """Sort tokens by expert and let `ragged_dot` multiply each run by its expert's matrix.

    Quantised experts are all dequantised first, into memory of their size.
    """
    if gate_up_scale is not None:
        gate_up = dequantise_blocks(gate_up, gate_up_scale, x.dtype)
        down = dequantise_blocks(down, down_scale, x.dtype)
    experts_per_token = expert_ids.shape[1]
    flat_ids = expert_ids.reshape(-1)
    order = jnp.argsort(flat_ids, stable=True)
    sizes = jnp.bincount(flat_ids, length=gate_up.shape[0])
    gate, up = jnp.split(jax.lax.ragged_dot(x[order // experts_per_token], gate_up, sizes), 2, axis=-1)
    rows = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, sizes)
    # Rows of no expert come last, beyond the runs.
    rows = jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(sizes), rows, 0)
    rows = rows[jnp.argsort(order)].reshape(*expert_ids.shape, -1)
    return jnp.einsum("tkm,tk->tm", rows, expert_weights.astype(x.dtype))


class Tiles(NamedTuple):
    """Assignments of tokens to experts, laid out so that every tile of slots belongs to one expert.

    Attributes:
        slot: [T, K] slot of each assignment; one beyond the last for assignments to no expert.
        token: [slots] token of each slot; slots without an assignment name any token.
        expert: [tiles] expert of each tile.
        num_tiles: Tiles in use; they come first.
    """

    slot: jax.Array
    token: jax.Array
    expert: jax.Array
    num_tiles: jax.Array


def plan_tiles(expert_ids: jax.Array, num_experts: int, tile: int) -> Tiles:
    """Lay assignments out by expert, each expert's run padded to whole tiles; `num_experts` itself is no expert."""
    num_tokens, experts_per_token = expert_ids.shape
    num_assignments = num_tokens * experts_per_token
    max_assignments = num_tokens * min(experts_per_token, num_experts)
    max_tiles = min(max_assignments, max_assignments // tile + num_experts)
    flat_ids = expert_ids.reshape(-1)
    order = jnp.argsort(flat_ids, stable=True)
    sizes = jnp.sum(flat_ids[:, None] == jnp.arange(num_experts), axis=0)
    tiles_end = jnp.cumsum(-(-sizes // tile))
    first_slot = (tiles_end - -(-sizes // tile)) * tile
    first_sorted = jnp.cumsum(sizes) - sizes
    sorted_ids = flat_ids[order]
    sorted_slots = first_slot[sorted_ids] + jnp.arange(num_assignments) - first_sorted[sorted_ids]
    sorted_slots = jnp.where(sorted_ids < num_experts, sorted_slots, max_tiles * tile)
    slot = jnp.zeros(num_assignments, jnp.int32).at[order].set(sorted_slots.astype(jnp.int32))
    sorted_tokens = (order // experts_per_token).astype(jnp.int32)
    token = jnp.zeros(max_tiles * tile, jnp.int32).at[sorted_slots].set(sorted_tokens, mode="drop")
    expert = jnp.sum(jnp.arange(max_tiles)[:, None] >= tiles_end, axis=1)
    return Tiles(slot.reshape(expert_ids.shape), token, expert, tiles_end[-1])


def tile_rows(num_tokens: int, experts_per_token: int, num_experts: int) -> int:
    """Choose the rows of a tile, near the square root of an expert's share of the assignments.

    Costs grow with the number of tiles, share / rows, and with the padding of an expert's last one, rows / 2.
    """
    share = num_tokens * experts_per_token // num_experts
    return 2 << share.bit_length() // 2


@jax.custom_vjp
def grouped_mlp_tiles(x, expert_ids, expert_weights, gate_up, down, gate_up_scale=None, down_scale=None):
    """Multiply tile after tile by its expert's matrices; the trip count is the number of tiles that hold a token.

    Quantised experts are dequantised tile after tile, and have no gradient.
    """
    return _run_tiles(x, expert_ids, expert_weights, gate_up, down, gate_up_scale, down_scale)[0]


def _tiles_forward(x, expert_ids, expert_weights, gate_up, down, gate_up_scale, down_scale):
    if gate_up_scale is not None:
        raise ValueError("grouped_mlp: quantised experts have no gradient")
    return _run_tiles(x, expert_ids, expert_weights, gate_up, down, None, None)


def _run_tiles(x, expert_ids, expert_weights, gate_up, down, gate_up_scale, down_scale):
    tile = tile_rows(*expert_ids.shape, gate_up.shape[0])
    tiles = plan_tiles(expert_ids, gate_up.shape[0], tile)
    slots = x[tiles.token]

    def matrix(stacked, scale, expert):
        picked = _pick(stacked, expert)
        return picked if scale is None else dequantise_blocks(picked, _pick(scale, expert), x.dtype)

    def run_tile(index, out):
        expert = tiles.expert[index]
        rows = jax.lax.dynamic_slice_in_dim(slots, index * tile, tile)
        gate, up = jnp.split(rows @ matrix(gate_up, gate_up_scale, expert), 2, axis=-1)
        rows = (jax.nn.silu(gate) * up) @ matrix(down, down_scale, expert)
        return jax.lax.dynamic_update_slice_in_dim(out, rows, index * tile, axis=0)

    slots = jax.lax.fori_loop(0, tiles.num_tiles, run_tile, jnp.zeros_like(slots))
    out = jnp.sum(_take(slots, tiles.slot) * expert_weights[:, :, None].astype(x.dtype), axis=1)
    return out, (x, expert_weights, gate_up, down, tiles)


def _tiles_backward(residuals, grad_out):
    x, expert_weights, gate_up, down, tiles = residuals
    tile = tiles.token.shape[0] // tiles.expert.shape[0]
    # Slots without an assignment weigh zero and so add nothing to any gradient.
    weights = jnp.zeros(tiles.token.shape, x.dtype).at[tiles.slot].set(expert_weights.astype(x.dtype), mode="drop")
    slots, grad_slots = x[tiles.token], grad_out[tiles.token]

    def run_tile(index, carry):
        grad_x, grad_weights, grad_gate_up, grad_down = carry
        expert, start = tiles.expert[index], index * tile
        rows, grad_rows = (jax.lax.dynamic_slice_in_dim(a, start, tile) for a in (slots, grad_slots))
        weight = jax.lax.dynamic_slice_in_dim(weights, start, tile)[:, None]
        gate, up = jnp.split(rows @ _pick(gate_up, expert), 2, axis=-1)
        hidden, pull_back = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        grad_hidden = grad_rows @ _pick(down, expert).T
        grad_gated = jnp.concatenate(pull_back(grad_hidden * weight), axis=-1)
        return (
            jax.lax.dynamic_update_slice_in_dim(grad_x, grad_gated @ _pick(gate_up, expert).T, start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(grad_weights, jnp.sum(grad_hidden * hidden, axis=1), start, axis=0),
            _add_at(grad_gate_up, expert, rows.T @ grad_gated),
            _add_at(grad_down, expert, (hidden * weight).T @ grad_rows),
        )

    zeros = (jnp.zeros_like(slots), jnp.zeros_like(weights), jnp.zeros_like(gate_up), jnp.zeros_like(down))
    grads = jax.lax.fori_loop(0, tiles.num_tiles, run_tile, zeros)
    grad_x = jnp.sum(_take(grads[0], tiles.slot), axis=1)
    return grad_x, None, _take(grads[1], tiles.slot).astype(expert_weights.dtype), grads[2], grads[3], None, None


def _take(slots, slot):
    """Zeros where there is no slot."""
    return slots.at[slot].get(mode="fill", fill_value=0)


def _pick(stacked, index):
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _add_at(stacked, index, value):
    return jax.lax.dynamic_update_index_in_dim(stacked, _pick(stacked, index) + value, index, axis=0)


grouped_mlp_tiles.defvjp(_tiles_forward, _tiles_backward)
