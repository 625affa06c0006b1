"""The expert MLP with its experts divided over a mesh axis; for use inside `shard_map`.

Two exact ways, neither of which has a capacity:

- Tokens replicated: every shard computes the part of its own experts for all tokens, and one all-reduce adds the parts.
  Each shard moves 2 (n - 1) / n x T M.
- Tokens sharded, t on each of n shards: the ids and weights of all tokens are gathered (8 K bytes a token, so that
  everybody knows everybody's sizes), each token goes once to each shard that has any of its experts, that shard weighs
  and adds what its experts say, and one row comes back. Each source owns t rows at each destination, so nothing can
  overflow however skewed the load is. `ragged` moves only the rows that hold a token: 2 (n - 1) t M x share of a
  shard, 1 - (1 - 1/n)^K for an even load (Kimi-K2 on 16 shards 0.40, on 32 0.22; Moonlight on 8 0.55). `padded` moves
  the same layout whole, share 1, as much as all-gather and reduce-scatter would; it serves where XLA has no
  `ragged_all_to_all`, on CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.grouped_matmul.api import grouped_mlp


def expert_parallel_mlp(
    x: Float[Array, "T M"],
    expert_ids: Int[Array, "T K"],
    expert_weights: Float[Array, "T K"],
    gate_up: Float[Array, "E M F2"],
    down: Float[Array, "E F M"],
    gate_up_scale: Float32[Array, "E blocks_m blocks_f2"] | None = None,
    down_scale: Float32[Array, "E blocks_f blocks_m"] | None = None,
    *,
    axis_name: str | tuple[str, ...],
    tokens_are_sharded: bool,
    exchange: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "T M"]:
    """Do what `grouped_mlp` does where each shard of an axis holds an equal run of the experts, in order.

    Call it inside `shard_map` with `check_vma=False`, which kernels need.

    Args:
        x: All tokens if they are replicated over the axis, this shard's if they are sharded.
        expert_ids: Experts of these tokens, counted over all shards.
        expert_weights: Their weights.
        gate_up: Gate then up matrix of each of this shard's experts.
        down: Their down matrices.
        gate_up_scale: Scales of `gate_up` if quantised, see `grouped_mlp`.
        down_scale: Likewise of `down`.
        axis_name: Mesh axis, or axes, over which the experts are divided.
        tokens_are_sharded: Whether the tokens are divided over it too.
        exchange: How sharded tokens travel, "ragged" or "padded"; None takes ragged except on CPU.
        implementation: Of `grouped_mlp` on each shard.

    Returns:
        The weighted sums of these tokens.

    Raises:
        ValueError: If there is no exchange or implementation of that name.
    """
    if exchange not in (None, "ragged", "padded"):
        raise ValueError(f"expert_parallel_mlp: no exchange {exchange!r}, there are ragged, padded")
    num_experts = gate_up.shape[0]
    shard = jax.lax.axis_index(axis_name)

    def run(x, ids, weights):
        """Compute this shard's part; the ids of others' experts become `num_experts`, which is none."""
        local = ids - shard * num_experts
        local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
        return grouped_mlp(x, local, weights, gate_up, down, gate_up_scale, down_scale, implementation=implementation)

    if not tokens_are_sharded:
        return jax.lax.psum(run(x, expert_ids, expert_weights), axis_name)

    num_shards, num_tokens = jax.lax.axis_size(axis_name), len(x)
    is_ragged = exchange == "ragged" or (exchange is None and jax.default_backend() != "cpu")
    all_ids = jax.lax.all_gather(expert_ids, axis_name)
    all_weights = jax.lax.all_gather(expert_weights, axis_name)
    # [source, token, destination]; a source packs a destination's tokens in their order.
    goes = jnp.any(all_ids[..., None] // num_experts == jnp.arange(num_shards), axis=2)
    num_sent = jnp.sum(goes, axis=1)
    order = jnp.argsort(~goes, axis=1, stable=True)
    sizes_out, sizes_in = num_sent[shard], num_sent[:, shard]

    def swap(rows, send_sizes, recv_sizes):
        """Exchange [other shard, token, M] rows, of which the first ones count."""
        if not is_ragged:
            return jax.lax.all_to_all(rows, axis_name, 0, 0)
        flat = rows.reshape(-1, rows.shape[-1])
        starts = jnp.arange(num_shards, dtype=jnp.int32) * num_tokens
        landing = jnp.full(num_shards, shard * num_tokens, jnp.int32)
        send_sizes, recv_sizes = send_sizes.astype(jnp.int32), recv_sizes.astype(jnp.int32)
        received = jax.lax.ragged_all_to_all(
            flat, jnp.zeros_like(flat), starts, send_sizes, landing, recv_sizes, axis_name=axis_name
        )
        return received.reshape(rows.shape)

    arrived = swap(x[order[shard].T], sizes_out, sizes_in)
    # Rows behind a source's last one name no expert of this shard: their tokens went elsewhere.
    source, place = jnp.arange(num_shards)[:, None], order[:, :, shard]
    ids, weights = (a[source, place].reshape(-1, a.shape[-1]) for a in (all_ids, all_weights))
    done = run(arrived.reshape(-1, x.shape[-1]), ids, weights).reshape(arrived.shape)
    returned = swap(done, sizes_in, sizes_out)
    mine = goes[shard]
    position = jnp.cumsum(mine, axis=0) - 1
    parts = returned[jnp.arange(num_shards), position].astype(jnp.float32)
    return jnp.sum(jnp.where(mine[:, :, None], parts, 0.0), axis=1).astype(x.dtype)
