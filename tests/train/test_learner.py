"""Claims about the learner, on one layer with experts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seer_jax.config.schema import EngineConfig, ModelSource, RunConfig, SamplingConfig, TrainConfig
from seer_jax.core.errors import ConfigError, ProtocolError
from seer_jax.core.types import RequestId, Sample
from seer_jax.models import decoder
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import decoder_specs
from seer_jax.train import learner as learner_module
from seer_jax.train.advantages import Advantages, group_advantages
from seer_jax.train.checkpoints import CheckpointInfo, open_checkpoints, restore_latest, save_checkpoint
from seer_jax.train.learner import Learner, compute_logprobs

MODEL = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=0,
)
MAX_LENGTH = 64


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nearly all of this file's time is compilation, half of that spent on optimising code that runs for 1 ms."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_params(dtype=np.float32):
    specs, rng = decoder_specs(MODEL, dtype), np.random.default_rng(0)
    params = jax.tree.map(lambda s: (rng.normal(size=s.shape) * s.shape[0] ** -0.5).astype(s.dtype), specs)
    params["final_norm"] = np.ones(MODEL.hidden_size, dtype)
    params["embed"] *= 4
    params["layers"][0]["moe"]["router_bias"] = np.array([0.3, -0.2, 0.1, 0.0], np.float32)
    return params


def make_config(temperature=1.0, tokens_per_microbatch=256, dtype="float32", **train) -> RunConfig:
    # One set of defaults, so that the tests share compiled programs.
    train = {"learning_rate": 3e-3, "warmup_updates": 0, "tokens_per_microbatch": tokens_per_microbatch} | train
    return RunConfig(
        model=ModelSource(dtype=dtype),
        sampling=SamplingConfig(max_tokens=40, temperature=temperature),
        engine=EngineConfig(max_model_len=MAX_LENGTH),
        train=TrainConfig(**train),
    )


def make_learner(params=None, **settings) -> Learner:
    return Learner(make_config(**settings), MODEL, params or make_params(), devices=jax.devices()[:1])


def make_samples(num_samples=12, policy_version=0, seed=0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_samples):
        num_prompt, num_tokens = rng.integers(2, 12), rng.integers(1, 40)
        samples.append(
            Sample(
                request_id=RequestId(index // 4, index % 4),
                prompt_token_ids=rng.integers(0, 31, num_prompt).astype(np.int32),
                token_ids=rng.integers(0, 31, num_tokens).astype(np.int32),
                logprobs=-rng.exponential(3.0, num_tokens).astype(np.float32),
                finish_reason="stop",
                policy_version=policy_version,
                num_chunks=1,
            )
        )
    return samples


@jax.jit
def next_token_table(params, token_ids, temperature=1.0):
    """All log-probabilities [B, L, V], straight from the model."""
    logits = decoder.project_logits(params, MODEL, decoder.forward_train(params, MODEL, token_ids))
    return jax.nn.log_softmax(logits / temperature)


def pad(samples):
    rows = np.zeros((len(samples), MAX_LENGTH), np.int32)
    for row, sample in zip(rows, samples, strict=True):
        text = np.concatenate([sample.prompt_token_ids, sample.token_ids])
        row[: len(text)] = text
    return rows


def record_logprobs(samples, params, temperature=1.0) -> list[Sample]:
    """Give samples the log-probabilities that a rollout with exactly these weights would have recorded."""
    recorded = []
    for sample, table in zip(samples, np.asarray(next_token_table(params, pad(samples), temperature)), strict=True):
        start = len(sample.prompt_token_ids) - 1
        logprobs = table[np.arange(start, start + len(sample.token_ids)), sample.token_ids]
        recorded.append(dataclasses.replace(sample, logprobs=logprobs))
    return recorded


def make_advantages(samples, seed=0) -> Advantages:
    rewards = np.random.default_rng(seed).normal(size=len(samples))
    return group_advantages(rewards, np.array([s.request_id.group_id for s in samples]), "grpo")


def first_gradient(learner, metrics):
    """The gradient of the only update so far, read back from Adam's first moment; frozen leaves are left out."""
    moment = optax.tree.get(learner.state.opt_state, "mu")
    return jax.tree.map(lambda m: np.asarray(m) / (1 - 0.9) * max(1.0, metrics["grad_norm"]), moment)


def assert_trees_close(left, right, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def test_gradients_accumulated_over_microbatches_are_the_full_batch_gradient():
    samples, gradients = make_samples(), []
    for tokens_per_microbatch, num_microbatches in ((256, 3), (1024, 1)):
        learner = make_learner(tokens_per_microbatch=tokens_per_microbatch)
        metrics = learner.update(samples, make_advantages(samples))
        assert metrics["num_microbatches"] == num_microbatches
        gradients.append(first_gradient(learner, metrics))
    assert_trees_close(*gradients)


def test_the_first_on_policy_gradient_is_minus_advantage_times_grad_log_pi_through_the_model():
    params, learner = make_params(), make_learner()
    samples = record_logprobs(make_samples(), params)
    advantages = make_advantages(samples)
    metrics = learner.update(samples, advantages)

    def expected_objective(params):
        total, tables = 0.0, next_token_table(params, pad(samples))
        for sample, advantage, table in zip(samples, advantages.values, tables, strict=True):
            start, num_tokens = len(sample.prompt_token_ids) - 1, len(sample.token_ids)
            logprobs = table[np.arange(start, start + num_tokens), sample.token_ids]
            total -= advantage * jnp.mean(logprobs) / len(samples)
        return total

    expected = jax.jit(jax.grad(expected_objective))(params)
    assert not expected["layers"][0]["moe"].pop("router_bias").any()
    gradient = first_gradient(learner, metrics)
    del gradient["layers"][0]["moe"]["router_bias"]
    assert_trees_close(gradient, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gap_is_zero_exactly_when_rollout_and_learner_share_weights_and_temperature(temperature):
    params, samples = make_params(), make_samples()
    same = make_learner(temperature=temperature).update(
        record_logprobs(samples, params, temperature), make_advantages(samples)
    )
    assert same["logprob_gap_max"] < 1e-5
    assert same["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and same["clip_fraction"] == 0.0
    other = make_learner(temperature=temperature).update(
        record_logprobs(samples, params, 1.1 * temperature), make_advantages(samples)
    )
    assert other["logprob_gap_mean"] > 1e-2


@pytest.mark.parametrize("remat", [False, True])
def test_replayed_routing_closes_the_gap_that_other_experts_open(remat):
    """A rollout whose router chose other experts, by a bias that the learner does not have; prompts of one token."""
    other, samples = make_params(), make_samples()
    other["layers"][0]["moe"]["router_bias"] = np.array([9, 0, 9, 0], np.float32)
    samples = [dataclasses.replace(s, prompt_token_ids=s.prompt_token_ids[:1]) for s in samples]
    samples = [
        dataclasses.replace(s, expert_ids=np.tile(np.int16([2, 0]), (len(s.token_ids), 1, 1)))
        for s in record_logprobs(samples, other)
    ]
    replayed = make_learner(replay_routing=True, remat=remat).update(samples, make_advantages(samples))
    own = make_learner(remat=remat).update(samples, make_advantages(samples))
    assert replayed["logprob_gap_max"] < 1e-5 and own["logprob_gap_mean"] > 1e-3


def test_replaying_what_a_sample_lacks_is_an_error_and_changes_nothing():
    learner, samples = make_learner(replay_routing=True), make_samples()
    before = learner.state
    with pytest.raises(ProtocolError, match=r"sample \(0, 0\) has no expert ids"):
        learner.update(samples, make_advantages(samples))
    assert learner.state is before


def test_a_sample_of_another_policy_version_is_a_protocol_error_and_changes_nothing():
    learner = make_learner()
    samples = make_samples()
    learner.update(samples, make_advantages(samples))
    before = learner.state
    with pytest.raises(ProtocolError, match=r"sample \(0, 0\) has policy version 0, the learner 1"):
        learner.update(samples, make_advantages(samples))
    assert learner.state is before and learner.policy_version == 1


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "k15"])
def test_updates_raise_the_probability_of_the_rewarded_token(loss):
    learner = make_learner(loss=loss)
    prompt, rng = np.array([3, 1, 4], np.int32), np.random.default_rng(0)
    rewarded, history = 7, []
    for version in range(8):
        logprobs = np.asarray(next_token_table(learner.params, prompt[None])[0, -1])
        history.append(float(np.exp(logprobs[rewarded])))
        draws = rng.choice(31, size=64, p=np.exp(logprobs) / np.exp(logprobs).sum()).astype(np.int32)
        samples = [
            Sample(
                request_id=RequestId(0, i),
                prompt_token_ids=prompt,
                token_ids=draws[i : i + 1],
                logprobs=logprobs[draws[i : i + 1]],
                finish_reason="length",
                policy_version=version,
                num_chunks=1,
            )
            for i in range(64)
        ]
        learner.update(samples, group_advantages((draws == rewarded).astype(float), np.zeros(64, int), loss))
    assert history[-1] > 2 * history[0], history


def test_the_routers_bias_is_frozen_only_matrices_decay_and_bfloat16_runs_update_float32_weights():
    learner = make_learner(make_params(jnp.bfloat16), dtype="bfloat16", weight_decay=1e-3, learning_rate=1e-2)
    samples, before = make_samples(), learner.state.params
    zero = Advantages(np.zeros(len(samples), np.float32), np.ones(len(samples), np.float32))
    learner.update(samples, zero)
    decayed, after = [], learner.state.params
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if np.array_equal(old, new):
            assert old.ndim == 1 or name in ("embed", "lm_head"), name
        else:
            np.testing.assert_allclose(new, old * (1 - 1e-5), rtol=1e-6)  # far below bfloat16's resolution
            decayed.append(name)
    assert {"layers.0.moe.router", "layers.0.moe.gate_up", "layers.0.attn.q_proj"} <= set(decayed)
    assert learner.params["embed"].dtype == jnp.bfloat16
    assert learner.params["layers"][0]["moe"]["router"].dtype == jnp.float32

    learner.update(make_samples(policy_version=1), make_advantages(samples))
    old, new = before["layers"][0], learner.state.params["layers"][0]
    np.testing.assert_array_equal(new["moe"]["router_bias"], old["moe"]["router_bias"])
    assert not np.array_equal(new["attn_norm"], old["attn_norm"])


def test_minibatches_each_take_an_optimizer_step_in_one_policy_version_and_one_trace(monkeypatch):
    traced, forward = [], decoder.forward_train

    def record(*args, **kwargs):
        traced.append(args[2].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward_train", record)
    params = make_params()
    learner = make_learner(params, num_minibatches=3)
    for version in range(2):
        samples = record_logprobs(make_samples(policy_version=version), learner.params)
        traced.clear()
        metrics = learner.update(samples, make_advantages(samples))
        assert len(traced) == (1 if version == 0 else 0), "a shape is compiled once"
        assert learner.policy_version == version + 1
        assert metrics["num_microbatches"] == 3
        assert metrics["logprob_gap_max"] < 1e-5 < metrics["ratio_max"] - 1.0, "the gap is measured before any update"
    moved = abs(np.asarray(learner.params["final_norm"]) - 1.0).max()
    assert 3 * 3e-3 < moved <= 6 * 3e-3 * 1.5, "six steps of Adam"
    np.testing.assert_array_equal(params["embed"], make_params()["embed"], "the caller's weights are untouched")


def test_the_kl_penalty_refers_to_the_initial_weights():
    learner = make_learner(kl_coef=10.0)
    samples = make_samples()
    first = learner.update(samples, make_advantages(samples))
    second = learner.update(make_samples(policy_version=1), make_advantages(samples))
    assert first["kl_ref"] == 0.0 < second["kl_ref"]


def test_logits_in_pieces_give_the_same_log_probabilities_and_gradients(monkeypatch):
    monkeypatch.setattr(decoder, "forward_train", lambda params, _, token_ids, **__: params["embed"][token_ids])
    params = jax.tree.map(jnp.asarray, make_params())
    token_ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (3, 20)), jnp.int32)

    def total(params):
        return jnp.sum(compute_logprobs(params, MODEL, token_ids, 0.8)[:, :-1] ** 2)

    whole = jax.jit(jax.value_and_grad(total))(params)
    monkeypatch.setattr(learner_module, "MAX_LOGITS", 3 * 31 * 6)  # 6 positions at a time; 20 is no multiple of 6
    assert_trees_close(jax.jit(jax.value_and_grad(lambda params: total(params)))(params), whole)


def test_a_microbatch_too_small_for_all_devices_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"train.tokens_per_microbatch: is 32.*give at least 64"):
        make_learner(tokens_per_microbatch=32)


@pytest.mark.slow
def test_a_resumed_learner_continues_bit_for_bit(tmp_path):
    samples = make_samples()
    learner, resumed = make_learner(), make_learner()
    learner.update(samples, make_advantages(samples))
    with open_checkpoints(tmp_path, 1) as manager:
        save_checkpoint(manager, learner.state, CheckpointInfo(iteration=1, seed=0, config_sha256=""))
    resumed.state, _ = restore_latest(tmp_path, resumed.state)
    for each in (learner, resumed):
        each.update(make_samples(policy_version=1, seed=1), make_advantages(samples))
    jax.tree.map(np.testing.assert_array_equal, resumed.state, learner.state)


def test_four_devices_compute_what_one_computes():
    script = """
import jax, json
jax.config.update("jax_disable_most_optimizations", True)
from tests.train.test_learner import Learner, MODEL, make_advantages, make_config, make_params, make_samples
learner = Learner(make_config(), MODEL, make_params())
print(json.dumps([learner.update(make_samples(policy_version=v), make_advantages(make_samples())) for v in range(2)]))
assert len(learner.params["embed"].sharding.device_set) == len(jax.devices()) == 4
"""
    learner, samples = make_learner(), make_samples()
    expected = [learner.update(make_samples(policy_version=v), make_advantages(samples)) for v in range(2)]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    flags["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for one, four in zip(expected, json.loads(done.stdout), strict=True):
        for name in ("loss", "grad_norm", "entropy", "ratio_max", "logprob_gap_mean", "kl_old"):
            assert four[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
