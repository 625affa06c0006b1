"""The declaration of parameters is complete, and counts what the published models count."""

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.models import decoder
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import abstract_params, decoder_specs, init_params, num_params
from seer_jax.sharding import ShardingRules
from tests.models.oracles import load_case
from tests.models.test_config import KIMI_K2
from tests.quick import quick_jit


def run(config, params, token_ids):
    return quick_jit(lambda params, ids: decoder.forward_train(params, config, ids))(params, token_ids)


def test_kimi_k2_has_its_published_number_of_parameters():
    specs = decoder_specs(DecoderConfig.from_hf(KIMI_K2), jnp.bfloat16)
    assert round(num_params(specs) / 1e9, 2) == 1026.41


def test_every_axis_has_a_rule_and_every_parameter_its_declared_form():
    config, _, _ = load_case("k2")
    specs = decoder_specs(config, jnp.bfloat16)
    params = init_params(jax.random.key(0), specs)
    abstract = abstract_params(specs)
    for spec, array, declared in zip(*map(jax.tree.leaves, (specs, params, abstract)), strict=True):
        assert len(spec.logical_axes) == len(spec.shape)
        ShardingRules().partition_spec(spec.logical_axes)
        assert (array.shape, array.dtype) == (declared.shape, declared.dtype) == (spec.shape, jnp.dtype(spec.dtype))
    assert params["layers"][1]["moe"]["router"].dtype == jnp.float32


def test_fresh_weights_start_near_a_uniform_guess():
    config, _, _ = load_case("moonlight")
    params = init_params(jax.random.key(0), decoder_specs(config, jnp.float32))
    ids = jax.random.randint(jax.random.key(1), (2, 32), 0, config.vocab_size)
    logits = decoder.project_logits(params, config, run(config, params, ids))
    assert 0.1 < np.std(logits) < 1.0


def test_tied_embeddings_serve_as_the_head():
    config, params, _ = load_case("moonlight")
    tied = DecoderConfig.from_hf(config.to_hf() | {"tie_word_embeddings": True})
    assert "lm_head" not in decoder_specs(tied, jnp.float32)
    hidden = jnp.ones((3, config.hidden_size))
    expected = hidden @ params["embed"].T
    np.testing.assert_array_equal(decoder.project_logits(params, tied, hidden), expected)


def test_bfloat16_stays_close_to_float32():
    config, params, oracle = load_case("moonlight")
    half = jax.tree.map(lambda a, spec: a.astype(spec.dtype), params, decoder_specs(config, jnp.bfloat16))
    hidden = run(config, half, oracle["input_ids"])
    logits = decoder.project_logits(half, config, hidden)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    # Routing flips for some tokens; the median error shows the arithmetic.
    assert np.median(np.abs(logits - oracle["logits"])) < 0.05


def test_padding_does_not_reach_real_tokens():
    config, params, oracle = load_case("k2")
    ids = jnp.asarray(oracle["input_ids"])
    padded = ids.at[:, 30:].set(0)
    full = run(config, params, ids)
    cut = run(config, params, padded)
    np.testing.assert_array_equal(cut[:, :30], full[:, :30])
