"""Mixture of experts with DeepSeek-V3's bias-balanced router (`noaux_tc`, arXiv 2412.19437 section 2.1.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import grouped_mlp
from seer_jax.models.config import DecoderConfig
from seer_jax.models.layers import swiglu_mlp
from seer_jax.models.specs import Params

ExpertMLP = Callable[..., Array]
"""(tokens, expert ids, their weights, `gate_up`, `down`, in float8 their scales) -> weighted sums, as `grouped_mlp`."""


def route(
    params: Params, config: DecoderConfig, x: Float[Array, "T M"], replayed: Int[Array, "T K"] | None = None
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Choose the experts of every token.

    The bias moves the choice only; the weights come from the unbiased scores. All in float32.

    Args:
        params: The layer's `moe` parameters.
        config: The shape.
        x: Normed residual stream.
        replayed: Experts that were chosen before, taken in place of the best ones; a row of -1 is chosen anew. The
            weights come from the scores of now all the same.

    Returns:
        Expert ids (no order promised) and weights, [T, num_experts_per_tok].
    """
    scores = jax.nn.sigmoid(x.astype(jnp.float32) @ params["router"])
    biased = scores + jax.lax.stop_gradient(params["router_bias"])
    if config.n_group > 1:
        biased = _mask_groups(config, biased)
    _, expert_ids = jax.lax.top_k(biased, config.num_experts_per_tok)
    if replayed is not None:
        expert_ids = jnp.where(replayed >= 0, replayed, expert_ids)
    weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if config.norm_topk_prob:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
    return expert_ids, weights * config.routed_scaling_factor


def _mask_groups(config: DecoderConfig, biased: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Keep the `topk_group` groups with the largest sum of two best scores; the others can never be chosen."""
    groups = biased.reshape(biased.shape[0], config.n_group, -1)
    group_scores = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
    _, kept = jax.lax.top_k(group_scores, config.topk_group)
    keep = jnp.any(kept[:, :, None] == jnp.arange(config.n_group), axis=1)
    return jnp.where(keep[:, :, None], groups, -jnp.inf).reshape(biased.shape)


def moe(
    params: Params,
    config: DecoderConfig,
    x: Float[Array, "T M"],
    replayed: Int[Array, "T K"] | None = None,
    *,
    experts: ExpertMLP = grouped_mlp,
) -> tuple[Float[Array, "T M"], Int[Array, "T K"]]:
    """Sum of the chosen experts, weighted, plus the shared expert; and the experts.

    `replayed` is `route`'s.
    """
    expert_ids, weights = route(params, config, x, replayed)
    scales = [params[name] for name in ("gate_up_scale", "down_scale") if name in params]
    routed = experts(x, expert_ids, weights, params["gate_up"], params["down"], *scales)
    return routed + swiglu_mlp(params["shared"], x), expert_ids
