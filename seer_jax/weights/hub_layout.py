"""Our parameter tree against the hub's tensors of a DeepSeek-V3 checkpoint, in both directions.

The hub keeps matrices [out, in], one tensor per expert and matrix, `kv_b_proj` with keys and values of a head
together, and RoPE pairs interleaved. `to_hub` is the declaration: run on abstract values it says which tensors, in
which shapes, a checkpoint must hold.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, abstract_params, decoder_specs
from seer_jax.weights.float8 import stack_expert

AnyArray = jax.Array | np.ndarray
ReadBlocks = Callable[[str], tuple[np.ndarray, np.ndarray]]

ATTENTION_NAMES = {
    "q_proj": "q_proj.weight",
    "q_a_proj": "q_a_proj.weight",
    "q_a_norm": "q_a_layernorm.weight",
    "q_b_proj": "q_b_proj.weight",
    "kv_a_proj": "kv_a_proj_with_mqa.weight",
    "kv_a_norm": "kv_a_layernorm.weight",
    "o_proj": "o_proj.weight",
}
"""Our name -> hub name of those attention parameters that correspond one to one."""


def hub_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint of this shape must hold."""
    abstract = abstract_params(decoder_specs(config, jnp.float32))
    return {name: tensor.shape for name, tensor in jax.eval_shape(lambda p: to_hub(config, p), abstract).items()}


def to_hub(config: DecoderConfig, params: Params) -> dict[str, AnyArray]:
    """Convert parameters to the hub's tensors."""
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = params["lm_head"].T
    for index, layer in enumerate(params["layers"]):
        prefix = f"model.layers.{index}."
        tensors[prefix + "input_layernorm.weight"] = layer["attn_norm"]
        tensors[prefix + "post_attention_layernorm.weight"] = layer["ffn_norm"]
        tensors |= _attention_to_hub(config, layer["attn"], prefix + "self_attn.")
        if config.is_moe_layer(index):
            tensors |= _moe_to_hub(layer["moe"], prefix + "mlp.")
        else:
            tensors |= _mlp_to_hub(layer["mlp"]["gate_up"], layer["mlp"]["down"], prefix + "mlp.")
    return tensors


def _attention_to_hub(config: DecoderConfig, attn: Params, prefix: str) -> dict[str, AnyArray]:
    rope = config.qk_rope_head_dim
    tensors = {}
    for ours, theirs in ATTENTION_NAMES.items():
        if ours in attn:
            tensor = attn[ours]
            if ours in ("q_proj", "q_b_proj"):
                per_head = tensor.reshape(tensor.shape[0], config.num_attention_heads, config.qk_head_dim)
                tensor = _interleave(per_head, rope).reshape(tensor.shape)
            elif ours == "kv_a_proj":
                tensor = _interleave(tensor, rope)
            tensors[prefix + theirs] = tensor.T
    per_head = jnp.concatenate([attn["k_up"], jnp.swapaxes(attn["v_up"], 1, 2)], axis=1)
    return tensors | {prefix + "kv_b_proj.weight": per_head.reshape(-1, config.kv_lora_rank)}


def _moe_to_hub(moe: Params, prefix: str) -> dict[str, AnyArray]:
    tensors = {prefix + "gate.weight": moe["router"].T, prefix + "gate.e_score_correction_bias": moe["router_bias"]}
    for expert in range(moe["router_bias"].shape[0]):
        tensors |= _mlp_to_hub(moe["gate_up"][expert], moe["down"][expert], f"{prefix}experts.{expert}.")
    return tensors | _mlp_to_hub(moe["shared"]["gate_up"], moe["shared"]["down"], prefix + "shared_experts.")


def _mlp_to_hub(gate_up: AnyArray, down: AnyArray, prefix: str) -> dict[str, AnyArray]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return {
        prefix + "gate_proj.weight": gate.T,
        prefix + "up_proj.weight": up.T,
        prefix + "down_proj.weight": down.T,
    }


def _interleave(x: AnyArray, rope: int) -> jax.Array:
    """Reorder the last `rope` columns from [firsts | seconds] of the pairs to pair after pair."""
    kept, pairs = jnp.split(x, [x.shape[-1] - rope], axis=-1)
    pairs = pairs.reshape(*x.shape[:-1], 2, rope // 2)
    return jnp.concatenate([kept, jnp.swapaxes(pairs, -1, -2).reshape(*x.shape[:-1], rope)], axis=-1)


def from_hub(
    config: DecoderConfig, read: Callable[[str], np.ndarray], read_experts: ReadBlocks | None = None
) -> Params:
    """Convert the hub's tensors to parameters, as numpy arrays in the checkpoint's own types.

    Args:
        config: The shape.
        read: Returns a tensor of `hub_shapes(config)` by name.
        read_experts: Returns the float8 values and the factors of a matrix of a routed expert, to be kept; None = they
            are tensors like any other.

    Returns:
        The tree of `decoder_specs`.
    """
    params = {"embed": read("model.embed_tokens.weight"), "final_norm": read("model.norm.weight"), "layers": []}
    if not config.tie_word_embeddings:
        params["lm_head"] = read("lm_head.weight").T
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        if config.is_moe_layer(index):
            ffn = {"moe": _moe_from_hub(config, read, read_experts, prefix + "mlp.")}
        else:
            gate_up, down = _mlp_from_hub(read, prefix + "mlp.")
            ffn = {"mlp": {"gate_up": gate_up, "down": down}}
        params["layers"].append(
            {
                "attn_norm": read(prefix + "input_layernorm.weight"),
                "attn": _attention_from_hub(config, read, prefix + "self_attn."),
                "ffn_norm": read(prefix + "post_attention_layernorm.weight"),
                **ffn,
            }
        )
    return params


def _attention_from_hub(config: DecoderConfig, read: Callable[[str], np.ndarray], prefix: str) -> Params:
    rope, heads = config.qk_rope_head_dim, config.num_attention_heads
    queries = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_norm", "q_b_proj")
    attn = {ours: read(prefix + ATTENTION_NAMES[ours]).T for ours in (*queries, "kv_a_proj", "kv_a_norm", "o_proj")}
    per_head = attn[queries[-1]].reshape(-1, heads, config.qk_head_dim)
    attn[queries[-1]] = _deinterleave(per_head, rope).reshape(attn[queries[-1]].shape)
    attn["kv_a_proj"] = _deinterleave(attn["kv_a_proj"], rope)
    kv_b = read(prefix + "kv_b_proj.weight").reshape(heads, -1, config.kv_lora_rank)
    attn["k_up"], v_up = np.split(kv_b, [config.qk_nope_head_dim], axis=1)
    return attn | {"v_up": np.swapaxes(v_up, 1, 2)}


def _moe_from_hub(
    config: DecoderConfig, read: Callable[[str], np.ndarray], read_experts: ReadBlocks | None, prefix: str
) -> Params:
    experts = []
    for of_expert in (f"{prefix}experts.{e}." for e in range(config.n_routed_experts)):
        if read_experts is None:
            experts.append(dict(zip(("gate_up", "down"), _mlp_from_hub(read, of_expert), strict=True)))
        else:
            names = (f"{of_expert}{name}_proj.weight" for name in ("gate", "up", "down"))
            experts.append(stack_expert(*map(read_experts, names)))
    shared_gate_up, shared_down = _mlp_from_hub(read, prefix + "shared_experts.")
    return {
        "router": read(prefix + "gate.weight").T,
        "router_bias": read(prefix + "gate.e_score_correction_bias"),
        **{name: np.stack([expert[name] for expert in experts]) for name in experts[0]},
        "shared": {"gate_up": shared_gate_up, "down": shared_down},
    }


def _mlp_from_hub(read: Callable[[str], np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    gate, up, down = (read(f"{prefix}{name}_proj.weight").T for name in ("gate", "up", "down"))
    return np.concatenate([gate, up], axis=-1), down


def _deinterleave(x: np.ndarray, rope: int) -> np.ndarray:
    """Invert `_interleave`."""
    kept, pairs = np.split(x, [x.shape[-1] - rope], axis=-1)
    pairs = np.swapaxes(pairs.reshape(*x.shape[:-1], rope // 2, 2), -1, -2)
    return np.concatenate([kept, pairs.reshape(*x.shape[:-1], rope)], axis=-1)
