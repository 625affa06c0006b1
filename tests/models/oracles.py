"""The reference fixtures, and a minimal paged decode loop to hold against them."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kv_update import kv_update
from kernels_pallas.mla_attention import mla_attention
from seer_jax.models import decoder, mla
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params
from seer_jax.weights import load_checkpoint

ORACLES = Path(__file__).parent.parent / "data/oracles"
CASES = ("moonlight", "k2", "dsv3_grouped")
PAGE_SIZE = 4


@cache
def load_case(case: str) -> tuple[DecoderConfig, Params, dict[str, np.ndarray]]:
    """Return shape, weights and reference outputs of a case."""
    config, params = load_checkpoint(ORACLES / case, "float32")
    return config, jax.tree.map(jnp.asarray, params), dict(np.load(ORACLES / case / "oracle.npz"))


def empty_caches(config: DecoderConfig, num_requests: int, max_tokens: int) -> tuple[list[jax.Array], jax.Array]:
    """Return caches with poison everywhere, and shuffled block tables; page 0 belongs to nobody."""
    pages = -(-max_tokens // PAGE_SIZE)
    order = np.random.default_rng(0).permutation(num_requests * pages) + 1
    shape = (num_requests * pages + 1, PAGE_SIZE, config.latent_width)
    caches = [jnp.full(shape, 1e3, jnp.float32) for _ in range(config.num_hidden_layers)]
    return caches, jnp.asarray(order.reshape(num_requests, pages), jnp.int32)


def paged_logits(
    config: DecoderConfig,
    params: Params,
    caches: list[jax.Array],
    block_tables: jax.Array,
    token_ids: jax.Array,
    first_position: jax.Array,
) -> tuple[jax.Array, list[jax.Array]]:
    """Run `token_ids` [N, Tq] of N requests from `first_position` [N] on; returns logits [N, Tq, V] and the caches."""
    tiles, width = token_ids.shape
    positions = first_position[:, None] + jnp.arange(width, dtype=jnp.int32)
    slots = jnp.take_along_axis(block_tables, positions // PAGE_SIZE, axis=1) * PAGE_SIZE + positions % PAGE_SIZE
    caches = list(caches)

    def attend(layer: int, queries: mla.MLAQueries, latent: jax.Array, attn: Params) -> jax.Array:
        caches[layer] = kv_update(caches[layer], latent, slots.reshape(-1))
        out = mla_attention(
            mla.absorb_queries(attn, queries).reshape(tiles, width, config.num_attention_heads, -1),
            caches[layer],
            block_tables,
            positions + 1,
            value_width=config.kv_lora_rank,
            scale=config.softmax_scale,
        )
        return mla.unabsorb_values(attn, out.reshape(tiles * width, *out.shape[2:]))

    hidden = decoder.forward(params, config, token_ids.reshape(-1), positions.reshape(-1), attend)
    return decoder.project_logits(params, config, hidden).reshape(tiles, width, -1), caches
