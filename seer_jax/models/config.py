"""Shape of a DeepSeek-V3-family decoder, read from a Hugging Face `config.json`.

Moonlight, Kimi-K2 and DeepSeek-V3 differ in these numbers only. Field names are Hugging Face's own.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seer_jax.core.errors import ConfigError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
"""Hugging Face `model_type`s that this decoder computes; `kimi_k2` is `deepseek_v3` under another name."""

LORA_NORM_EPS = 1e-6
"""Epsilon of the norms on the low-rank q and kv projections: always this, whatever `rms_norm_eps` says."""

_REQUIRED_VALUES = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0,),
    "rope_interleave": (True,),
    "quantization_config": (None,),
}
"""Fields that select code we do not have: absent, or one of these."""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: stretch the slow RoPE frequencies by `factor` to reach beyond the pre-training length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, coefficient: float) -> float:
        """YaRN's m(a) = 0.1 a ln(factor) + 1."""
        return 0.1 * coefficient * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that decides the shapes and the arithmetic of the decoder.

    Attributes:
        q_lora_rank: Rank of the query projection; None = one full matrix (Moonlight).
        kv_lora_rank: Width of the compressed keys and values (C).
        qk_rope_head_dim: Width of the rotated key that all heads share (R).
        n_group: Expert groups of group-limited routing; 1 = off.
        first_k_dense_replace: Leading layers with a dense MLP in place of experts.
        eos_token_id: Tokens that end a text, as a tuple.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("first_k_dense_replace", "bos_token_id")
            if (
                field.type in (int, int | None)
                and value is not None
                and (value < 0 or (value == 0 and not may_be_zero))
            ):
                raise _field_error(field.name, f"must be positive, got {value}")
        if self.qk_rope_head_dim % 2:
            raise _field_error("qk_rope_head_dim", f"must be even to be rotated in pairs, got {self.qk_rope_head_dim}")
        if self.n_routed_experts % self.n_group:
            raise _field_error("n_group", f"{self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise _field_error("topk_group", f"{self.topk_group} exceeds n_group {self.n_group}")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise _field_error("n_group", "a group needs two experts, its score is the sum of its two best")
        eligible = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > eligible:
            raise _field_error(
                "num_experts_per_tok", f"{self.num_experts_per_tok} exceeds the {eligible} eligible experts"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values that the KV cache keeps per token and layer: [compressed kv | rotated key]."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q.k, YaRN's magnitude included."""
        magnitude = self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) if self.rope_scaling else 1.0
        return self.qk_head_dim**-0.5 * magnitude**2

    @property
    def expert_ids_shape(self) -> tuple[int, int]:
        """Shape of the expert ids of a token: MoE layers, experts per token.

        Raises:
            ConfigError: If the model has no MoE layer, or ids that do not fit int16; names `engine.expert_ids`.
        """
        num_layers, most = self.num_hidden_layers - self.first_k_dense_replace, 2**15
        if num_layers <= 0:
            problem = f"the model has none: first_k_dense_replace makes all {self.num_hidden_layers} layers dense"
            raise ConfigError("engine.expert_ids", problem, "give false")
        if self.n_routed_experts > most:
            problem = f"the model has {self.n_routed_experts} experts, above the {most} that int16 can name"
            raise ConfigError("engine.expert_ids", problem, "give false")
        return num_layers, self.num_experts_per_tok

    def is_moe_layer(self, layer_index: int) -> bool:
        """Say whether a layer routes to experts (True) or has one dense MLP."""
        return layer_index >= self.first_k_dense_replace

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "DecoderConfig":
        """Read a `config.json` of the hub (`rope_theta`, `rope_scaling`) or of transformers 5 (`rope_parameters`).

        Args:
            hf: The decoded `config.json`.

        Returns:
            The shape.

        Raises:
            ConfigError: A field is missing, or asks for something that this decoder does not compute.
        """
        if hf.get("model_type") not in MODEL_TYPES:
            raise _field_error(
                "model_type", f"{hf.get('model_type')!r} is not supported", f"one of {', '.join(MODEL_TYPES)}"
            )
        for name, allowed in _REQUIRED_VALUES.items():
            if name in hf and hf[name] not in allowed:
                raise _field_error(name, f"{hf[name]!r} is not supported", f"only {allowed[0]!r} is")
        values = {f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf}
        values["rope_theta"], values["rope_scaling"] = _read_rope(hf)
        eos = hf.get("eos_token_id")
        values["eos_token_id"] = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        values.setdefault("q_lora_rank", None)
        for field in dataclasses.fields(cls):
            if field.name not in values and field.default is dataclasses.MISSING:
                raise _field_error(field.name, "is missing from config.json")
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` that Hugging Face transformers and `from_hf` read."""
        hf = dataclasses.asdict(self) | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "eos_token_id": self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None,
        }
        hf |= {name: allowed[0] for name, allowed in _REQUIRED_VALUES.items() if allowed[0] is not None}
        if hf["rope_scaling"] is not None:
            hf["rope_scaling"]["type"] = "yarn"
        return hf


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    rope = {k: v for k, v in (hf.get("rope_parameters") or hf.get("rope_scaling") or {}).items() if v is not None}
    theta = rope.pop("rope_theta", hf.get("rope_theta"))
    if theta is None:
        raise _field_error("rope_theta", "is missing from config.json")
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    if kinds == {"default"}:
        return float(theta), None
    if kinds != {"yarn"}:
        raise _field_error("rope_scaling", f"type {sorted(kinds)} is not supported", "yarn, or none")
    known = {f.name for f in dataclasses.fields(YarnScaling)}
    if unknown := set(rope) - known:
        raise _field_error(
            "rope_scaling", f"unknown key {sorted(unknown)[0]!r}", f"known are {', '.join(sorted(known))}"
        )
    for name in ("factor", "original_max_position_embeddings"):
        if name not in rope:
            raise _field_error("rope_scaling", f"{name} is missing")
    return float(theta), YarnScaling(**rope)


def _field_error(name: str, message: str, hint: str = "") -> ConfigError:
    return ConfigError(f"model.config.{name}", message, hint)
