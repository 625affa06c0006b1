"""The device program of the decode loop: one ragged step, or several decode steps in one dispatch.

The host sends one packed int32 array (`core.packing`), the device returns one small int32 array and the updated caches.
Running out of pages is a host decision before launch; the device only does arithmetic.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from kernels_pallas.kv_update import kv_update
from kernels_pallas.mla_attention import mla_attention
from seer_jax.core import packing
from seer_jax.core.packing import StepShape
from seer_jax.engine.sampler import sample
from seer_jax.models import decoder, mla
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params

Caches = list[Array]
"""One array [num_pages, page_size, latent_width] per layer; separate, so that each is updated in place."""
StepFn = Callable[[Params, Caches, Array], tuple[Caches, Array]]

CPU_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
"""A quarter less compile time and no slower: matmuls are library calls, what LLVM compiles is small."""


class Entries(NamedTuple):
    """The packed entries as device arrays; E entries, P pages per block table."""

    first_position: Int32[Array, "E"]
    count: Int32[Array, "E"]
    sample: Int32[Array, "E"]
    remaining: Int32[Array, "E"]
    keys: UInt32[Array, "E 2"]
    top_k: Int32[Array, "E"]
    temperature: Float32[Array, "E"]
    top_p: Float32[Array, "E"]
    stop_ids: Int32[Array, "E stops"]
    block_tables: Int32[Array, "E P"]


class LoopState(NamedTuple):
    """What the decode steps of one dispatch carry."""

    step: Int32[Array, ""]
    caches: Caches
    tokens: Int32[Array, "_"]
    position: Int32[Array, "E"]
    num_emitted: Int32[Array, "E"]
    is_active: Bool[Array, "E"]
    has_finished: Bool[Array, ""]
    outputs: Int32[Array, "steps 2 E"]


@cache
def make_step(config: DecoderConfig, shape: StepShape, *, max_steps: int) -> StepFn:
    """Build the jitted program of one bucket; engines of one process share it.

    A program without prefill tiles runs up to `packed[0] <= max_steps` decode steps in a `while_loop` and leaves it as
    soon as a request finishes, so that its slot is refilled at once. A program with tiles runs one mixed step.

    Args:
        config: Shapes of the model.
        shape: The bucket.
        max_steps: Bound of the decode steps in one dispatch.

    Returns:
        `step(params, caches, packed) -> (caches, outputs)`. Caches are donated. `outputs` is int32
        [1 + 2 * steps, num_entries]: how many tokens each entry emitted, then token ids and bits of log-probabilities
        of step 0, of step 1, ... A program that verifies returns int32 [2, num_tokens]: the tokens drawn after every
        token, and the bits of their log-probabilities.
    """

    run_model = partial(_run_model, config=config, shape=shape)
    options = CPU_COMPILER_OPTIONS if jax.default_backend() == "cpu" else None

    def verify(params: Params, caches: Caches, packed: Array) -> tuple[Caches, Array]:
        entries, token_ids = _unpack(packed, shape)
        arrays = entries.first_position, entries.count, entries.block_tables
        hidden, caches = run_model(params, caches, token_ids, *arrays)
        of_token = jax.tree.map(lambda column: jnp.repeat(column, shape.tile, axis=0), entries)
        drawn, logprobs = sample(
            decoder.project_logits(params, config, hidden),
            of_token.keys,
            of_token.first_position + jnp.tile(jnp.arange(shape.tile), shape.num_tiles) + 1,
            of_token.temperature,
            of_token.top_k,
            of_token.top_p,
            truncates=shape.truncates,
        )
        return caches, jnp.stack([drawn, jax.lax.bitcast_convert_type(logprobs, jnp.int32)])

    if shape.verifies:
        return jax.jit(verify, donate_argnums=1, compiler_options=options)

    def step(params: Params, caches: Caches, packed: Array) -> tuple[Caches, Array]:
        entries, token_ids = _unpack(packed, shape)

        def advance(state: LoopState) -> LoopState:
            count = jnp.where(state.is_active, entries.count, 0)
            hidden, caches = run_model(params, state.caches, state.tokens, state.position, count, entries.block_tables)
            logits = decoder.project_logits(params, config, hidden[_last_tokens(count, shape)])
            position = state.position + count
            drawn, logprobs = sample(
                logits,
                entries.keys,
                position,
                entries.temperature,
                entries.top_k,
                entries.top_p,
                truncates=shape.truncates,
            )
            # Prefill rows of the deterministic mode compute KV in the first step only; they must not sample.
            samples = state.is_active & (entries.sample > 0)
            num_emitted = state.num_emitted + samples
            is_stop = (drawn[:, None] == entries.stop_ids).any(axis=1)
            ends = samples & (is_stop | (num_emitted >= entries.remaining))
            line = jnp.stack([drawn, jax.lax.bitcast_convert_type(logprobs, jnp.int32)])
            return LoopState(
                step=state.step + 1,
                caches=caches,
                tokens=drawn,
                position=position,
                num_emitted=num_emitted,
                is_active=samples & ~ends,
                has_finished=ends.any(),
                outputs=jax.lax.dynamic_update_index_in_dim(state.outputs, line, state.step, axis=0),
            )

        state = LoopState(
            step=jnp.int32(0),
            caches=caches,
            tokens=token_ids,
            position=entries.first_position,
            num_emitted=jnp.zeros(shape.num_entries, jnp.int32),
            is_active=entries.count > 0,
            has_finished=jnp.bool_(False),
            outputs=jnp.zeros((1 if shape.num_tiles else max_steps, 2, shape.num_entries), jnp.int32),
        )
        if shape.num_tiles:
            state = advance(state)
        else:
            state = jax.lax.while_loop(
                lambda s: (s.step < packed[0]) & s.is_active.any() & ~s.has_finished, advance, state
            )
        return state.caches, jnp.concatenate([state.num_emitted[None], state.outputs.reshape(-1, shape.num_entries)])

    return jax.jit(step, donate_argnums=1, compiler_options=options)


def unpack_outputs(outputs: np.ndarray, entry: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and log-probabilities that an entry emitted, from the program's output on the host."""
    count = outputs[0, entry]
    return outputs[1 : 1 + 2 * count : 2, entry], outputs[2 : 2 + 2 * count : 2, entry].view(np.float32)


def _unpack(packed: Int32[Array, "_"], shape: StepShape) -> tuple[Entries, Int32[Array, "T"]]:
    """Undo `core.packing.pack` on device."""
    table_end = shape.packed_size - shape.num_tokens
    table = packed[1:table_end].reshape(shape.num_entries, packing.NUM_FIELDS + shape.num_pages)
    floats = jax.lax.bitcast_convert_type(table, jnp.float32)
    words = jax.lax.bitcast_convert_type(table, jnp.uint32)
    entries = Entries(
        first_position=table[:, packing.FIRST_POSITION],
        count=table[:, packing.COUNT],
        sample=table[:, packing.SAMPLE],
        remaining=table[:, packing.REMAINING],
        keys=words[:, packing.KEY_LOW : packing.KEY_HIGH + 1],
        top_k=table[:, packing.TOP_K],
        temperature=floats[:, packing.TEMPERATURE],
        top_p=floats[:, packing.TOP_P],
        stop_ids=table[:, packing.STOP_IDS : packing.NUM_FIELDS],
        block_tables=table[:, packing.NUM_FIELDS :],
    )
    return entries, packed[table_end:]


def _run_model(
    params: Params,
    caches: Caches,
    token_ids: Int32[Array, "T"],
    first_position: Int32[Array, "E"],
    count: Int32[Array, "E"],
    block_tables: Int32[Array, "E P"],
    *,
    config: DecoderConfig,
    shape: StepShape,
) -> tuple[Float[Array, "T M"], Caches]:
    """One forward over the packed tokens; returns their hidden states, and the caches."""
    num_rows, tile = shape.num_rows, shape.tile
    offset = jnp.arange(tile)
    positions = jnp.concatenate([first_position[:num_rows], (first_position[num_rows:, None] + offset).reshape(-1)])
    is_real = jnp.concatenate([count[:num_rows] > 0, (offset < count[num_rows:, None]).reshape(-1)])
    token_tables = jnp.concatenate([block_tables[:num_rows], jnp.repeat(block_tables[num_rows:], tile, axis=0)])
    page_size = caches[0].shape[1]
    page = jnp.take_along_axis(token_tables, positions[:, None] // page_size, axis=1, mode="clip")[:, 0]
    slots = jnp.where(is_real, page * page_size + positions % page_size, 0)
    new_caches = list(caches)

    def attend(layer: int, queries: mla.MLAQueries, latent: Array, attention_params: Params) -> Array:
        cache = kv_update(caches[layer], latent.astype(caches[layer].dtype), slots)
        new_caches[layer] = cache
        absorbed = mla.absorb_queries(attention_params, queries)
        outputs = []
        for part, width, span in (
            (absorbed[:num_rows], 1, slice(0, num_rows)),
            (absorbed[num_rows:], tile, slice(num_rows, shape.num_entries)),
        ):
            if len(part):
                tiles = part.reshape(-1, width, *part.shape[1:])
                output = mla_attention(
                    tiles,
                    cache,
                    block_tables[span],
                    first_position[span],
                    count[span],
                    value_width=config.kv_lora_rank,
                    scale=config.softmax_scale,
                )
                outputs.append(output.reshape(-1, *output.shape[2:]))
        return mla.unabsorb_values(attention_params, jnp.concatenate(outputs))

    hidden = decoder.forward(params, config, token_ids, positions, attend)
    return hidden, new_caches


def _last_tokens(count: Int32[Array, "E"], shape: StepShape) -> Int32[Array, "E"]:
    """Index of every entry's last token among the packed ones."""
    entry, num_rows = jnp.arange(shape.num_entries), shape.num_rows
    in_tiles = num_rows + (entry - num_rows) * shape.tile + jnp.maximum(count - 1, 0)
    return jnp.where(entry < num_rows, entry, in_tiles)
