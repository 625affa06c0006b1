"""Logits, routing and gradients equal Hugging Face's for tiny Moonlight, Kimi-K2 and DeepSeek-V3 checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.models import decoder
from seer_jax.models.layers import rms_norm
from seer_jax.models.moe import route
from seer_jax.weights.hub_layout import to_hub
from tests.models.oracles import CASES, empty_caches, load_case, paged_logits
from tests.quick import quick_jit

TOLERANCE = 1e-4


def expanded_logits(config, params, token_ids):
    def logits(params, token_ids):
        return decoder.project_logits(params, config, decoder.forward_train(params, config, token_ids))

    return quick_jit(logits)(params, token_ids)


@pytest.mark.parametrize("case", CASES)
def test_paged_prefill_and_decode_equal_the_reference(case):
    config, params, oracle = load_case(case)
    prompt = oracle["input_ids"][:, :12]
    num_requests, steps = oracle["decode_ids"].shape
    caches, block_tables = empty_caches(config, num_requests, prompt.shape[1] + steps)
    step = quick_jit(lambda caches, ids, start: paged_logits(config, params, caches, block_tables, ids, start))
    # The prompt in two slices, so that the second one attends to pages that the first one wrote.
    for start in (0, 6):
        logits, caches = step(caches, prompt[:, start : start + 6], jnp.full(num_requests, start, jnp.int32))
        np.testing.assert_allclose(logits, oracle["logits"][:, start : start + 6], atol=TOLERANCE, rtol=0)
    logits = logits[:, -1:]
    for index in range(steps):
        np.testing.assert_allclose(logits[:, 0], oracle["decode_logits"][:, index], atol=TOLERANCE, rtol=0)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        np.testing.assert_array_equal(tokens[:, 0], oracle["decode_ids"][:, index])
        logits, caches = step(caches, tokens, jnp.full(num_requests, prompt.shape[1] + index, jnp.int32))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_routing_equal_the_reference(case, monkeypatch):
    config, params, oracle = load_case(case)

    @quick_jit
    def run(params, token_ids):
        routed = []

        def spy(*args):
            routed.append(route(*args))
            return routed[-1]

        monkeypatch.setattr("seer_jax.models.moe.route", spy)
        hidden = decoder.forward_train(params, config, token_ids)
        return decoder.project_logits(params, config, hidden), routed

    logits, routed = run(params, oracle["input_ids"])
    np.testing.assert_allclose(logits, oracle["logits"], atol=TOLERANCE, rtol=0)
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    assert len(routed) == len(layers)
    for layer, (expert_ids, weights) in zip(layers, routed, strict=True):
        ours, theirs = np.argsort(expert_ids, axis=1), np.argsort(oracle[f"router_ids_{layer}"], axis=1)
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(expert_ids), ours, axis=1),
            np.take_along_axis(oracle[f"router_ids_{layer}"], theirs, axis=1),
        )
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(weights), ours, axis=1),
            np.take_along_axis(oracle[f"router_weights_{layer}"], theirs, axis=1),
            atol=1e-5,
        )


@pytest.mark.parametrize(("case", "remat"), [("moonlight", False), ("k2", True), ("dsv3_grouped", False)])
def test_loss_and_gradients_equal_the_reference(case, remat):
    config, params, oracle = load_case(case)
    ids = oracle["input_ids"]

    def loss(params):
        hidden = decoder.forward_train(params, config, jnp.asarray(ids), remat=remat)
        logprobs = jax.nn.log_softmax(decoder.project_logits(params, config, hidden[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1))

    nll, grads = quick_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(nll, oracle["nll"], rtol=1e-5)
    grads = to_hub(config, grads)
    checked = [name.removeprefix("grad/") for name in oracle if name.startswith("grad/")]
    assert len(checked) >= 10
    for name in checked:
        expected = oracle["grad/" + name]
        np.testing.assert_allclose(grads[name], expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0, err_msg=name)
    assert not any(np.any(grads[name]) for name in grads if name.endswith("e_score_correction_bias"))


def test_blocks_of_queries_change_nothing(monkeypatch):
    config, params, oracle = load_case("k2")
    monkeypatch.setattr("seer_jax.models.mla.QUERY_BLOCK", 16)
    logits = expanded_logits(config, params, oracle["input_ids"])
    np.testing.assert_allclose(logits, oracle["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [("k2", "rope_scaling", None), ("dsv3_grouped", "n_group", 1), ("moonlight", "norm_topk_prob", False)],
)
def test_the_comparison_notices_a_wrong_model(case, field, value):
    config, params, oracle = load_case(case)
    wrong = dataclasses.replace(config, **{field: value}, **({"topk_group": 1} if field == "n_group" else {}))
    assert np.abs(expanded_logits(wrong, params, oracle["input_ids"]) - oracle["logits"]).max() > 10 * TOLERANCE


def test_the_comparison_notices_a_wrong_epsilon_in_the_inner_norms(monkeypatch):
    config, params, oracle = load_case("moonlight")
    monkeypatch.setattr("seer_jax.models.mla.rms_norm", lambda x, w, _: rms_norm(x, w, config.rms_norm_eps))
    assert np.abs(expanded_logits(config, params, oracle["input_ids"]) - oracle["logits"]).max() > 10 * TOLERANCE
