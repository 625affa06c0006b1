"""At a fixed shape a row's bits depend on nothing but its own request: what the deterministic mode rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import decoder_specs, init_params
from tests.models.oracles import empty_caches, load_case, paged_logits
from tests.quick import quick_jit

WIDE = DecoderConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
)
"""The shape of `scripts/bench_decode.py`: wide enough that matmuls split their contraction."""


def wide_model():
    return WIDE, init_params(jax.random.key(0), decoder_specs(WIDE, jnp.float32))


def narrow_model():
    config, params, _ = load_case("dsv3_grouped")
    return config, params


@pytest.mark.parametrize(("model", "num_requests"), [(wide_model, 7), (wide_model, 16), (narrow_model, 5)])
def test_a_row_keeps_its_bits_among_other_rows_and_at_another_place(model, num_requests):
    config, params = model()
    rng = np.random.default_rng(0)
    context = 9
    caches, block_tables = empty_caches(config, num_requests, 16)
    step = jax.jit(lambda caches, tables, ids, start: paged_logits(config, params, caches, tables, ids, start))
    prompts = rng.integers(0, config.vocab_size, (num_requests, context)).astype(np.int32)
    tokens = rng.integers(0, config.vocab_size, (num_requests, 1)).astype(np.int32)
    for position in range(context):
        every = jnp.full(num_requests, position, jnp.int32)
        _, caches = step(caches, block_tables, jnp.asarray(prompts[:, position : position + 1]), every)
    # Requests at different depths of their context.
    start = jnp.asarray(rng.integers(1, context + 1, num_requests), jnp.int32)
    logits, _ = step(caches, block_tables, jnp.asarray(tokens), start)

    order = rng.permutation(num_requests)
    moved, _ = step(caches, block_tables[order], jnp.asarray(tokens[order]), start[order])
    np.testing.assert_array_equal(moved, logits[order])

    others = tokens.copy()
    others[1:] = (others[1:] + 1) % config.vocab_size
    changed, _ = step(caches, block_tables, jnp.asarray(others), start.at[1:].set(0))
    np.testing.assert_array_equal(changed[0], logits[0])


def test_a_request_keeps_its_bits_in_other_pages():
    config, params = narrow_model()
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(0, config.vocab_size, (3, 8)), jnp.int32)
    caches, block_tables = empty_caches(config, 3, 12)
    step = quick_jit(lambda tables: paged_logits(config, params, caches, tables, prompts, jnp.zeros(3, jnp.int32))[0])
    np.testing.assert_array_equal(step(block_tables), step(block_tables[::-1]))


def test_a_wrong_context_is_noticed():
    config, params = narrow_model()
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 8)), jnp.int32)
    caches, block_tables = empty_caches(config, 2, 12)
    zeros = jnp.zeros(2, jnp.int32)
    step = quick_jit(lambda caches, tables, ids, start: paged_logits(config, params, caches, tables, ids, start))
    _, caches = step(caches, block_tables, prompts, zeros)
    start, token = jnp.full(2, 8, jnp.int32), jnp.full((2, 1), 5, jnp.int32)
    right, _ = step(caches, block_tables, token, start)
    swapped, _ = step(caches, block_tables[::-1], token, start)
    assert np.abs(right - swapped).max() > 1e-2
    np.testing.assert_array_equal(right, swapped[::-1])
