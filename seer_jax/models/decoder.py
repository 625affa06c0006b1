"""The decoder: one forward over a flat list of tokens; who may see whom is the caller's `attend`.

Rollout packs tokens of many requests and attends over the paged cache; training packs whole sequences and attends
causally. Everything else is the same code, so learner and rollout cannot drift apart.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import grouped_mlp
from seer_jax.models.config import DecoderConfig
from seer_jax.models.layers import rms_norm, swiglu_mlp
from seer_jax.models.mla import MLAQueries, expanded_attention, project
from seer_jax.models.moe import ExpertMLP, moe
from seer_jax.models.rope import rotation
from seer_jax.models.specs import Params

Attend = Callable[[int, MLAQueries, Float[Array, "T W"], Params], Float[Array, "T H v"]]
"""(layer index, rotated queries, cache rows of the same tokens, the layer's `attn` parameters) -> values per head."""
NoteExperts = Callable[[Int[Array, "T K"]], None]
"""Told the experts of every token, by one MoE layer after the other; K = `num_experts_per_tok`, in no given order."""


def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int[Array, " T"],
    positions: Int[Array, " T"],
    attend: Attend,
    *,
    note_experts: NoteExperts | None = None,
    replayed: Int[Array, "T moe_layers K"] | None = None,
    experts: ExpertMLP = grouped_mlp,
    remat: bool = False,
) -> Float[Array, "T M"]:
    """Run all layers over T tokens.

    Args:
        params: Weights laid out as `decoder_specs`.
        config: The shape.
        token_ids: Tokens, of any number of requests.
        positions: Position of each token in its own request.
        attend: Attention among the tokens and whatever came before them.
        note_experts: Told which experts the layers choose; None = nobody asks.
        replayed: Experts to take in place of the layers' choice; -1 = the layer chooses, see `moe.route`.
        experts: What computes the routed experts.
        remat: Recompute each layer in the backward pass in place of keeping its activations.

    Returns:
        Hidden states after the final norm.
    """
    cos, sin = rotation(config, positions)
    x = params["embed"][token_ids]

    for index, layer in enumerate(params["layers"]):

        def run_layer(
            layer: Params, x: Float[Array, "T M"], index: int = index
        ) -> tuple[Float[Array, "T M"], Int[Array, "T K"] | None]:
            with jax.named_scope("mla"):
                normed = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
                queries, latent = project(layer["attn"], config, normed, cos, sin)
                values = attend(index, queries, latent, layer["attn"])
                x = x + values.reshape(x.shape[0], -1) @ layer["attn"]["o_proj"]
            with jax.named_scope("ffn"):
                normed = rms_norm(x, layer["ffn_norm"], config.rms_norm_eps)
                if not config.is_moe_layer(index):
                    return x + swiglu_mlp(layer["mlp"], normed), None
                given = None if replayed is None else replayed[:, index - config.first_k_dense_replace]
                out, expert_ids = moe(layer["moe"], config, normed, given, experts=experts)
                return x + out, expert_ids if note_experts is not None else None

        x, expert_ids = (jax.checkpoint(run_layer) if remat else run_layer)(layer, x)
        if expert_ids is not None:
            note_experts(expert_ids)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def forward_train(
    params: Params,
    config: DecoderConfig,
    token_ids: Int[Array, "B L"],
    *,
    replayed: Int[Array, "B L moe_layers K"] | None = None,
    remat: bool = False,
) -> Float[Array, "B L M"]:
    """Run whole sequences with expanded causal attention, differentiable, experts in plain XLA.

    Args:
        params: Weights laid out as `decoder_specs`.
        config: The shape.
        token_ids: Sequences, padded at the end; rows at padding are finite and mean nothing.
        replayed: See `forward`.
        remat: Recompute each layer in the backward pass in place of keeping its activations.

    Returns:
        Hidden states after the final norm.
    """
    batch, length = token_ids.shape

    def attend(_: int, queries: MLAQueries, latent: Float[Array, "T W"], attn: Params) -> Float[Array, "T H v"]:
        return expanded_attention(attn, config, queries, latent, length)

    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    if replayed is not None:
        replayed = replayed.reshape(-1, *replayed.shape[2:])
    hidden = forward(
        params,
        config,
        token_ids.reshape(-1),
        positions,
        attend,
        replayed=replayed,
        experts=partial(grouped_mlp, implementation="xla"),
        remat=remat,
    )
    return hidden.reshape(batch, length, -1)


def lm_head(params: Params, config: DecoderConfig) -> Float[Array, "M V"]:
    """Return the matrix from hidden states to logits."""
    return params["embed"].T if config.tie_word_embeddings else params["lm_head"]


def project_logits(params: Params, config: DecoderConfig, hidden: Float[Array, "... M"]) -> Float[Array, "... V"]:
    """Return float32 logits."""
    return jnp.matmul(hidden, lm_head(params, config), preferred_element_type=jnp.float32)
