"""`config.json` is read in both spellings, and what we cannot compute is refused by name."""

import json

import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.models.config import DecoderConfig, YarnScaling
from tests.models.oracles import CASES, ORACLES

KIMI_K2 = {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": 163584,
    "eos_token_id": [163585, 163586],
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
}


def test_a_hub_config_is_read():
    config = DecoderConfig.from_hf(KIMI_K2)
    assert config.latent_width == 576
    assert config.eos_token_id == (163585, 163586)
    assert config.rope_scaling.factor == 32.0
    # 192^-0.5 times the square of YaRN's magnitude.
    assert config.softmax_scale == pytest.approx(0.130861, abs=1e-6)


def test_both_spellings_of_rope_mean_the_same():
    theta = KIMI_K2["rope_theta"]
    new = {k: v for k, v in KIMI_K2.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = KIMI_K2["rope_scaling"] | {"rope_type": "yarn", "rope_theta": theta}
    assert DecoderConfig.from_hf(new) == DecoderConfig.from_hf(KIMI_K2)


@pytest.mark.parametrize("case", CASES)
def test_writing_and_reading_gives_the_same_config(case):
    config = DecoderConfig.from_hf(json.loads((ORACLES / case / "config.json").read_text()))
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "qwen2", "model_type"),
        ("attention_bias", True, "attention_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("scoring_func", "softmax", "scoring_func"),
        ("topk_method", "greedy", "topk_method"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("num_nextn_predict_layers", 1, "num_nextn_predict_layers"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "rope_scaling"),
        ("rope_scaling", KIMI_K2["rope_scaling"] | {"truncate": False}, "rope_scaling"),
        ("rope_theta", None, "rope_theta"),
        ("hidden_size", 0, "hidden_size"),
        ("n_group", 7, "n_group"),
        ("topk_group", 2, "topk_group"),
        ("num_experts_per_tok", 385, "num_experts_per_tok"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(field, value, named):
    with pytest.raises(ConfigError) as caught:
        DecoderConfig.from_hf(KIMI_K2 | {field: value})
    assert caught.value.path == f"model.config.{named}"


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        DecoderConfig.from_hf({k: v for k, v in KIMI_K2.items() if k != "kv_lora_rank"})


def test_yarn_magnitude_is_one_without_stretching():
    assert YarnScaling(factor=1.0, original_max_position_embeddings=64).magnitude(1.0) == 1.0
