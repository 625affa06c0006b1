"""Every parameter of the decoder, declared once: shape, type, logical axes, initialiser.

Abstract values, shardings, fresh weights and the checkpoint's expectations all come from this tree. The layout is the
one that compute wants, so that no step slices or transposes a weight: matrices are [in, out], layers a Python list
(slices of stacked layers cost 3x on CPU), MLA's two halves of `kv_b_proj` separate arrays, experts stacked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul.blocks import BLOCK, QUANTISED, num_blocks
from seer_jax.models.config import DecoderConfig

Params = dict[str, Any]
"""Nested dict of arrays (or of `ParamSpec`s), `layers` a list."""

Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """Declaration of one parameter.

    Attributes:
        shape: Shape.
        dtype: Element type.
        logical_axes: A name per axis (see `seer_jax.sharding.rules`), None for axes that are never split.
        init: `(generator, shape) -> float32 array`, fresh values.
    """

    shape: tuple[int, ...]
    dtype: Any
    logical_axes: tuple[str | None, ...]
    init: Initializer


def decoder_specs(config: DecoderConfig, dtype: Any, *, has_float8_experts: bool = False) -> Params:
    """Declare the parameters of a decoder.

    Args:
        config: The shape.
        dtype: Type of all weights but the router's, which is float32: its top-k must not flip by rounding.
        has_float8_experts: Whether routed experts are float8 with scales, see `weights.float8.stack_expert`.

    Returns:
        A tree of `ParamSpec`; `lm_head` is absent when it is tied to the embedding.
    """
    layers = [_layer_specs(config, index, dtype, has_float8_experts) for index in range(config.num_hidden_layers)]
    model = config.hidden_size
    specs = {
        "embed": _normal((config.vocab_size, model), ("vocab", None), 1.0, dtype),
        "layers": layers,
        "final_norm": _ones((model,), dtype),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = _normal((model, config.vocab_size), (None, "vocab"), 0.5 * model**-0.5, dtype)
    return specs


def float8_experts_in(params: Params) -> bool:
    """Whether the routed experts of these parameters are float8 with scales."""
    return any("gate_up_scale" in layer.get("moe", {}) for layer in params["layers"])


def _layer_specs(config: DecoderConfig, index: int, dtype: Any, has_float8_experts: bool) -> Params:
    ffn = (
        {"moe": _moe_specs(config, dtype, has_float8_experts)}
        if config.is_moe_layer(index)
        else {"mlp": _mlp_specs(config, config.intermediate_size, dtype)}
    )
    model = config.hidden_size
    return {
        "attn_norm": _ones((model,), dtype),
        "attn": _mla_specs(config, dtype),
        "ffn_norm": _ones((model,), dtype),
        **ffn,
    }


def _mla_specs(config: DecoderConfig, dtype: Any) -> Params:
    model, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, value, query_width = config.qk_nope_head_dim, config.v_head_dim, heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = {"q_proj": _matrix(model, query_width, (None, "heads"), dtype)}
    else:
        query = {
            "q_a_proj": _matrix(model, config.q_lora_rank, (None, None), dtype),
            "q_a_norm": _ones((config.q_lora_rank,), dtype),
            "q_b_proj": _matrix(config.q_lora_rank, query_width, (None, "heads"), dtype),
        }
    return query | {
        "kv_a_proj": _matrix(model, config.latent_width, (None, None), dtype),
        "kv_a_norm": _ones((rank,), dtype),
        "k_up": _normal((heads, nope, rank), ("heads", None, None), rank**-0.5, dtype),
        "v_up": _normal((heads, rank, value), ("heads", None, None), rank**-0.5, dtype),
        "o_proj": _output_matrix(config, (heads * value, model), ("heads", None), dtype),
    }


def _mlp_specs(config: DecoderConfig, width: int, dtype: Any) -> Params:
    return {
        "gate_up": _matrix(config.hidden_size, 2 * width, (None, "mlp"), dtype),
        "down": _output_matrix(config, (width, config.hidden_size), ("mlp", None), dtype),
    }


def _moe_specs(config: DecoderConfig, dtype: Any, has_float8_experts: bool) -> Params:
    model, experts, width = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    shared = _mlp_specs(config, config.n_shared_experts * width, dtype)
    scales = {}
    if has_float8_experts:
        width, dtype = num_blocks(width) * BLOCK, QUANTISED
        scales = {
            name: ParamSpec(
                shape=(experts, num_blocks(rows), num_blocks(columns)),
                dtype=jnp.float32,
                logical_axes=("experts", None, None),
                init=lambda _, shape: np.ones(shape),
            )
            for name, rows, columns in (("gate_up_scale", model, 2 * width), ("down_scale", width, model))
        }
    return scales | {
        "router": _matrix(model, experts, (None, None), jnp.float32),
        "router_bias": ParamSpec(
            shape=(experts,), dtype=jnp.float32, logical_axes=(None,), init=lambda _, shape: np.zeros(shape)
        ),
        "gate_up": _normal((experts, model, 2 * width), ("experts", None, "expert_mlp"), model**-0.5, dtype),
        "down": _output_matrix(config, (experts, width, model), ("experts", "expert_mlp", None), dtype),
        "shared": shared,
    }


def _normal(shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, dtype: Any) -> ParamSpec:
    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return std * generator.standard_normal(shape, np.float32)

    return ParamSpec(shape=shape, dtype=dtype, logical_axes=axes, init=draw)


def _matrix(rows: int, columns: int, axes: tuple[str | None, ...], dtype: Any) -> ParamSpec:
    return _normal((rows, columns), axes, rows**-0.5, dtype)


def _output_matrix(
    config: DecoderConfig, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any
) -> ParamSpec:
    # What a layer adds to the residual stream shrinks with depth, so that the stream's scale does not grow (GPT-2).
    return _normal(shape, axes, (shape[-2] * 2 * config.num_hidden_layers) ** -0.5, dtype)


def _ones(shape: tuple[int, ...], dtype: Any) -> ParamSpec:
    return ParamSpec(shape=shape, dtype=dtype, logical_axes=(None,) * len(shape), init=lambda _, shape: np.ones(shape))


def init_params(key: jax.Array, specs: Params) -> Params:
    """Draw fresh weights; each parameter has its own random stream.

    Drawn by numpy: compiling jax's generator for every shape takes longer than training a tiny model's first steps.

    Args:
        key: JAX random key, the seed.
        specs: Tree of `ParamSpec`.

    Returns:
        Arrays on the default device.
    """
    leaves, structure = jax.tree.flatten(specs)
    generators = np.random.default_rng(np.asarray(jax.random.key_data(key))).spawn(len(leaves))
    arrays = [jnp.asarray(s.init(g, s.shape), s.dtype) for s, g in zip(leaves, generators, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def abstract_params(specs: Params) -> Params:
    """Return `jax.ShapeDtypeStruct`s in the place of the specs."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def num_params(specs: Params) -> int:
    """Count the parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
