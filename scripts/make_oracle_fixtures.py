"""Write the reference fixtures of tests/data/oracles with Hugging Face transformers.

    pip install torch "transformers>=5.23"    # not dependencies of seer_jax; the fixtures are in the repository
    python scripts/make_oracle_fixtures.py

Each case is a tiny random checkpoint (`config.json`, `model.safetensors` with the hub's names) and `oracle.npz`:
  input_ids [2, 40], logits [2, 40, V]
  router_ids_{layer}, router_weights_{layer}   [80, K] experts of every token, unordered
  decode_ids [2, 8], decode_logits [2, 8, V]   greedy continuation of the first 12 tokens, with Hugging Face's cache
  nll, grad/{hub name}                         mean next-token loss of input_ids and some of its gradients
All float32 on CPU with fixed seeds. Weights are large enough that routing, attention and gates are far from trivial,
the selection bias is never zero, and Moonlight's `rms_norm_eps` is raised so that using it in MLA's inner norms shows.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "num_mtp_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def yarn(factor: float, beta_fast: float) -> dict:
    """YaRN as Kimi-K2 (32, 1) and DeepSeek-V3 (40, 32) set it, over an original length of 64."""
    return {
        "type": "yarn",
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }


CASES = {
    "moonlight": {
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-2,
        "rope_theta": 50000.0,
        "max_position_embeddings": 8192,
    },
    "k2": {
        "q_lora_rank": 20,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": yarn(32.0, 1.0),
        "max_position_embeddings": 2048,
    },
    "dsv3_grouped": {
        "q_lora_rank": 20,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": yarn(40.0, 32.0),
        "max_position_embeddings": 2560,
    },
}

GRADIENTS = (
    "embed_tokens",
    "lm_head",
    "layers.1.self_attn",
    "layers.1.input_layernorm",
    "layers.1.mlp.gate",
    "layers.2.mlp.experts",
)
"""Parameters, by part of their name, whose gradients are kept."""


def main() -> None:
    """Write every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests/data/oracles")
    out = parser.parse_args().out
    for seed, (name, fields) in enumerate(CASES.items(), start=1):
        write_case(out / name, DeepseekV3Config(**SHAPE, **fields), seed)


def write_case(path: Path, config: DeepseekV3Config, seed: int) -> None:
    """Write one checkpoint with what Hugging Face computes from it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    draw_weights(model, seed)
    model.save_pretrained(path)
    (path / "generation_config.json").unlink()
    # Loading what was saved proves that the checkpoint, and not only the model in memory, gives these outputs.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor(np.random.default_rng(seed).integers(3, config.vocab_size, size=(2, 40)))
    oracle = {"input_ids": ids.numpy().astype(np.int32)}
    margin = record_forward(model, ids, oracle)
    record_decode(model, ids[:, :12], 8, oracle)
    record_gradients(model, ids, oracle)
    np.savez_compressed(path / "oracle.npz", **oracle)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(
        json.dumps(
            {"case": path.name, "bytes": size, "logit_std": float(oracle["logits"].std()), "router_margin": margin}
        )
    )


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter and buffer but the rotary frequencies."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(1.3 * noise / math.sqrt(tensor.shape[-1]))


@torch.no_grad()
def record_forward(model: torch.nn.Module, ids: torch.Tensor, oracle: dict) -> float:
    """Record logits and routing; returns the smallest gap between the last chosen and the first unchosen score."""
    margins, hooks = [], []

    def hook(layer: int):
        def record(gate, inputs, output) -> None:
            logits, weights, experts = output
            oracle[f"router_ids_{layer}"] = experts.numpy().astype(np.int32)
            oracle[f"router_weights_{layer}"] = weights.numpy()
            margins.append(selection_margin(model.config, torch.sigmoid(logits) + gate.e_score_correction_bias))

        return record

    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(hook(index)))
    oracle["logits"] = model(input_ids=ids, use_cache=False).logits.numpy()
    for handle in hooks:
        handle.remove()
    return min(margins)


def selection_margin(config: DeepseekV3Config, biased: torch.Tensor) -> float:
    """Smallest gap between the last chosen and the first unchosen, of groups and of experts."""

    def gap(scores: torch.Tensor, chosen: int) -> float:
        best = scores.topk(chosen + 1)[0]
        return float((best[:, -2] - best[:, -1]).min())

    if config.n_group == 1:
        return gap(biased, config.num_experts_per_tok)
    groups = biased.view(len(biased), config.n_group, -1)
    group_scores = groups.topk(2)[0].sum(-1)
    kept = group_scores.topk(config.topk_group)[1]
    eligible = groups.gather(1, kept[:, :, None].expand(-1, -1, groups.shape[-1])).flatten(1)
    return min(gap(group_scores, config.topk_group), gap(eligible, config.num_experts_per_tok))


@torch.no_grad()
def record_decode(model: torch.nn.Module, prompt: torch.Tensor, steps: int, oracle: dict) -> None:
    """Record a greedy continuation."""
    inputs, past, tokens, logits = prompt, None, [], []
    for _ in range(steps):
        output = model(input_ids=inputs, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[:, -1].numpy())
        inputs = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(inputs[:, 0].numpy())
    oracle["decode_ids"] = np.stack(tokens, 1).astype(np.int32)
    oracle["decode_logits"] = np.stack(logits, 1)


def record_gradients(model: torch.nn.Module, ids: torch.Tensor, oracle: dict) -> None:
    """Record the mean next-token loss and gradients, under the names that the hub gives the parameters."""
    logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1], -1)
    loss = -logprobs.gather(-1, ids[:, 1:, None]).mean()
    loss.backward()
    oracle["nll"] = loss.detach().numpy()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not any(part in name for part in GRADIENTS):
            continue
        grad = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            for half, kept in zip(("gate", "up"), np.split(grad[0], 2), strict=True):
                oracle["grad/" + name.replace("gate_up_proj", f"0.{half}_proj.weight")] = kept
        elif name.endswith("experts.down_proj"):
            oracle["grad/" + name.replace("down_proj", "0.down_proj.weight")] = grad[0]
        else:
            oracle["grad/" + name] = grad


if __name__ == "__main__":
    main()
