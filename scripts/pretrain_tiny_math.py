"""Train the base checkpoint `configs/model/tiny_math` from nothing, in minutes on two cores, and measure it.

Supervised next-token training on written chains of `chain_sum`: some careful, some hasty, with slips left in, so that
the model knows the task but is right only some of the time, and reinforcement learning has something to choose.

    python scripts/pretrain_tiny_math.py --out configs/model/tiny_math
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from seer_jax.config.schema import EngineConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import Sample
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.models import decoder
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, decoder_specs, init_params, num_params
from seer_jax.train.loop import make_groups, make_sampling
from seer_jax.train.rewards import compute_rewards
from seer_jax.train.tasks import Prompt, length_statistics
from seer_jax.train.tasks.chain_sum import MAX_OPERANDS, ChainSum, draw_operands, make_prompt, write_chain
from seer_jax.train.tokenizer import BOS_ID, EOS_ID, PAD_ID, decode, encode
from seer_jax.weights import save_checkpoint

CONFIG = DecoderConfig(
    vocab_size=264,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    routed_scaling_factor=2.446,
    first_k_dense_replace=1,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=1024,
    bos_token_id=BOS_ID,
    eos_token_id=(EOS_ID,),
)
"""Moonlight-16B-A3B, 10,000 times smaller."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes the checkpoint what it is."""

    out: Path | None = None
    """Directory that the checkpoint is written to; None writes nothing."""
    seed: int = 0
    """Seed of weights, prompts, styles and slips."""
    updates: int = 2400
    """Optimizer updates."""
    tokens_per_update: int = 2048
    """Padded tokens of a batch."""
    learning_rate: float = 3e-3
    """Peak of warm-up (2 %) and cosine (to 5 %)."""
    hasty_share: float = 0.55
    """Share of responses that take two digits a step."""
    careful_error_rate: float = 0.02
    """Slips per step of a careful response."""
    hasty_error_rate: float = 0.2
    """Slips per step of a hasty response."""
    curriculum_updates: int = 600
    """Updates during which the longest prompt grows from 4 digits to the maximum."""
    eval_groups: int = 64
    """Held-out prompts sampled for the report."""
    max_tokens: int = 512
    """Generation limit of the report."""


BUCKETS = (64, 96, 128, 192, 256, 384, 544)
"""Padded lengths, prompt and response: one compilation each."""


def make_batches(recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Write training batches for ever: token ids and loss mask [batch, length], all rows of about the same length."""
    rng = np.random.default_rng(recipe.seed)
    filling: dict[int, list[tuple[np.ndarray, int]]] = {length: [] for length in BUCKETS}
    index, update = 0, 0
    while True:
        operands = draw_operands(recipe.seed, "train", index)
        index += 1
        if len(operands) > 4 + 48 * update / max(recipe.curriculum_updates, 1):
            continue
        hasty = rng.random() < recipe.hasty_share
        error_rate = recipe.hasty_error_rate if hasty else recipe.careful_error_rate
        prompt = make_prompt(operands).token_ids
        tokens = np.concatenate([prompt, encode(write_chain(operands, 1 + hasty, error_rate, rng), add_eos=True)])
        length = next(length for length in BUCKETS if length >= len(tokens))
        filling[length].append((tokens, len(prompt)))
        if len(filling[length]) == recipe.tokens_per_update // length:
            yield pad_rows(filling[length], length)
            filling[length] = []
            update += 1


def pad_rows(rows: list[tuple[np.ndarray, int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows to one length; the mask is 1 on response tokens."""
    token_ids = np.full((len(rows), length), PAD_ID, np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, (tokens, num_prompt_tokens) in enumerate(rows):
        token_ids[i, : len(tokens)] = tokens
        mask[i, num_prompt_tokens : len(tokens)] = 1.0
    return token_ids, mask


def train(recipe: Recipe) -> Params:
    """Train and return the parameters."""
    key, bias_key = jax.random.split(jax.random.key(recipe.seed))
    params = init_params(key, decoder_specs(CONFIG, jnp.float32))
    # The selection bias gets no gradient. Small fixed values in place of zeros, so that swapping biased and unbiased
    # scores anywhere in the project shows.
    for i, layer in enumerate(params["layers"]):
        if "moe" in layer:
            noise = jax.random.normal(jax.random.fold_in(bias_key, i), (CONFIG.n_routed_experts,))
            layer["moe"]["router_bias"] = 0.02 * noise
    warmup = max(recipe.updates // 50, 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, warmup, recipe.updates, 0.05 * recipe.learning_rate
    )
    decayed = jax.tree.map(lambda p: p.ndim >= 2, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decayed)
    )

    def loss_function(params, token_ids, mask):
        hidden = decoder.forward_train(params, CONFIG, token_ids[:, :-1])
        logits = decoder.project_logits(params, CONFIG, hidden)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, token_ids[:, 1:])
        return jnp.sum(loss * mask[:, 1:]) / jnp.sum(mask[:, 1:])

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, token_ids, mask):
        loss, gradients = jax.value_and_grad(loss_function)(params, token_ids, mask)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, batches, losses, start = optimizer.init(params), make_batches(recipe), [], time.perf_counter()
    for i in range(recipe.updates):
        params, state, loss = update(params, state, *next(batches))
        losses.append(loss)
        if (i + 1) % 100 == 0:
            mean = float(np.mean(jax.device_get(losses[-100:])))
            print(f"update {i + 1} loss {mean:.4f} {time.perf_counter() - start:.0f} s", flush=True)
    return params


def sample_heldout(params: Params, recipe: Recipe) -> tuple[dict[int, Prompt], list[Sample]]:
    """Sample groups of responses to held-out prompts at temperature 1, with the project's own rollout."""
    config = RunConfig(
        seed=recipe.seed,
        sampling=SamplingConfig(max_tokens=recipe.max_tokens),
        rollout=RolloutConfig(runtime="local", instances=1),
        engine=EngineConfig(max_num_seqs=32),
    )
    prompts = dict(enumerate(ChainSum().make_prompts(recipe.seed, "heldout", recipe.eval_groups)))
    groups = make_groups(prompts, config.rollout.group_size, make_sampling(config, CONFIG.eos_token_id), 0)
    driver = RolloutDriver(make_policy(config.rollout.policy, config.rollout))
    cluster = build_local_cluster(config, CONFIG, jax.device_get(params))
    return prompts, RolloutRunner(cluster, driver).run(groups).samples


def report(params: Params, recipe: Recipe) -> dict[str, Any]:
    """Measure reward, styles and lengths of the base model on held-out prompts at temperature 1."""
    prompts, samples = sample_heldout(params, recipe)
    rewards, _ = compute_rewards(ChainSum(), prompts, samples, TrainConfig.reward_timeout_s)
    careful = np.array(["=" in decode(sample.token_ids)[:4] for sample in samples])
    counts = np.array([prompts[sample.request_id.group_id].record["num_operands"] for sample in samples])
    lengths = np.array([len(sample.token_ids) for sample in samples])
    group_rewards = rewards.reshape(len(prompts), -1).mean(axis=1)
    stats = length_statistics(lengths.reshape(len(prompts), -1), recipe.max_tokens)
    edges = (2, 5, 9, 14, 22, MAX_OPERANDS + 1)
    result = {
        "reward": rewards.mean(),
        "reward_careful": rewards[careful].mean(),
        "reward_hasty": rewards[~careful].mean(),
        "careful_share": careful.mean(),
        "groups_with_both_rewards": np.mean((group_rewards > 0) & (group_rewards < 1)),
        "mean_length": stats.mean,
        "limit_over_mean_length": stats.limit_over_mean,
        "group_correlation_of_lengths": stats.group_correlation,
        "share_at_limit": np.mean(lengths == recipe.max_tokens),
    }
    for low, high in itertools.pairwise(edges):
        result[f"reward_{low}_to_{high - 1}_digits"] = rewards[(counts >= low) & (counts < high)].mean()
    return {name: round(float(value), 3) for name, value in result.items()}


RECIPE_PAGE = """# tiny_math

Base model of the `chain_sum` task (`docs/tiny_math.md`): {num_params:,} parameters in Moonlight's shape, trained from
random weights by

    python scripts/pretrain_tiny_math.py {arguments}

The selection bias of the router is random, small and frozen, not balanced by load. What else decides the weights:

{settings}

Measured at the end, at temperature 1 on held-out prompts, groups of 8:

{figures}
"""


def write_checkpoint(out: Path, params: Params, recipe: Recipe, result: dict[str, Any]) -> None:
    """Write weights, configuration and RECIPE.md."""
    save_checkpoint(out, CONFIG, jax.device_get(params))
    settings = "\n".join(f"- {name}: {value}" for name, value in asdict(recipe).items() if name != "out")
    figures = "\n".join(f"- {name}: {value}" for name, value in result.items())
    page = RECIPE_PAGE.format(
        num_params=result["num_params"], arguments=f"--out {out}", settings=settings, figures=figures
    )
    (out / "RECIPE.md").write_text(page)


def main(recipe: Recipe) -> None:
    """Train, measure, save, and print the figures as one JSON line."""
    start = time.perf_counter()
    params = train(recipe)
    trained_s = time.perf_counter() - start
    specs = decoder_specs(CONFIG, jnp.float32)
    result = {"num_params": num_params(specs), "training_wall_s": round(trained_s), **report(params, recipe)}
    if recipe.out is not None:
        write_checkpoint(recipe.out, params, recipe, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Recipe))
