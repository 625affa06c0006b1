"""The device program of the decode loop: one ragged step, or several decode steps in one dispatch.

The host sends one packed int32 array (`core.packing`), the device returns one small int32 array and the updated caches.
Running out of pages is a host decision before launch; the device only does arithmetic.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from kernels_pallas.kv_update import kv_update
from seer_jax.core import packing
from seer_jax.core.step_shapes import StepShape
from seer_jax.engine.parallel import ONE_DEVICE, ParallelOps, by_rank, on_each_rank, parallel_ops
from seer_jax.engine.sampler import sample
from seer_jax.engine.verify import Emitted, Tokens, locate, move_accepted, walk
from seer_jax.models import decoder, mla
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params

Caches = list[Array]
"""One array [num_pages, page_size, row_width] per layer, see `pad_row_width`; separate, to be updated in place."""
StepFn = Callable[[Params, Caches, Array], tuple[Caches, Array]]

CPU_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
"""A quarter less compile time and no slower: matmuls are library calls, what LLVM compiles is small."""


class Requests(NamedTuple):
    """The requests of a step as device arrays; R requests, P pages per block table."""

    remaining: Int32[Array, "R"]
    keys: UInt32[Array, "R 2"]
    top_k: Int32[Array, "R"]
    temperature: Float32[Array, "R"]
    top_p: Float32[Array, "R"]
    stop_ids: Int32[Array, "R stops"]
    block_tables: Int32[Array, "R P"]


class LoopState(NamedTuple):
    """What the steps of one dispatch carry; K tokens at most are emitted by a request."""

    step: Int32[Array, ""]
    caches: Caches
    tokens: Tokens
    first_position: Int32[Array, "R"]
    last_tokens: Int32[Array, "R"]
    num_emitted: Int32[Array, "R"]
    is_active: Bool[Array, "R"]
    has_finished: Bool[Array, ""]
    emitted_ids: Int32[Array, "R K"]
    emitted_logprobs: Float32[Array, "R K"]
    emitted_experts: Int32[Array, "R K words"] | None


@cache
def make_step(
    config: DecoderConfig,
    shape: StepShape,
    *,
    max_steps: int,
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> StepFn:
    """Build the jitted program of one bucket; engines of one process share it.

    A program without tiles runs up to `packed[0] <= max_steps` steps in a `while_loop` and leaves it as soon as a
    request finishes, so that its slot is refilled at once; after the first step every request has one token. A program
    with tiles runs one step. Data-parallel ranks step and leave together.

    Args:
        config: Shapes of the model.
        shape: The bucket, of each rank.
        max_steps: Bound of the steps in one dispatch.
        mesh: Several devices, over which weights and caches lie as `parallel.place` says; None = one device.
        implementation: What computes attention, experts and draws on each device; None chooses by platform.

    Returns:
        `step(params, caches, packed) -> (caches, outputs)`. Caches are donated. `outputs` is int32
        [1 + num_requests * (1 + 2 K + K * words)]: steps run; then of every request how many tokens it emitted, the
        tokens, the bits of their log-probabilities and, if `shape.expert_ids`, the experts behind them, two ids a word
        (`core.packing.unpack_outputs`). `packed` and `outputs` are of one rank after the other.
    """
    ops = parallel_ops(mesh, implementation)
    run_model = partial(_run_model, config=config, shape=shape, ops=ops)
    num_requests, depth = shape.num_requests, shape.max_depth
    loops, num_words = not shape.num_tiles, packing.expert_words(shape)

    def step(params: Params, caches: Caches, packed: Array) -> tuple[Caches, Array]:
        requests, first_position, tokens, last_tokens = _unpack(packed, shape)

        def draw(state: LoopState, hidden: Array) -> Emitted:
            """Draw after every query token, or after the last one of every request."""
            if depth:
                owner, at = state.tokens.request, jnp.arange(shape.num_tokens)
            else:
                owner, at = jnp.arange(num_requests), jnp.maximum(state.last_tokens, 0)
            positions = state.first_position[owner] + state.tokens.depth[at] + 1
            draws = (requests.keys[owner], positions, requests.temperature[owner])
            if shape.truncates:
                logits = decoder.project_logits(params, config, hidden[at])
                drawn, logprobs = sample(logits, *draws, requests.top_k[owner], requests.top_p[owner], truncates=True)
            else:
                drawn, logprobs, _ = ops.draw(hidden[at], decoder.lm_head(params, config), *draws)
            if depth:
                return walk(drawn, logprobs, state.tokens, requests.stop_ids, requests.remaining, depth)
            count = (state.last_tokens >= 0).astype(jnp.int32)
            return Emitted(count, drawn[:, None], logprobs[:, None], at[:, None])

        def advance(state: LoopState) -> LoopState:
            hidden, caches, experts = run_model(
                params, state.caches, state.tokens, state.first_position, requests.block_tables
            )
            emitted = draw(state, hidden)
            if shape.has_trees:
                caches = move_accepted(caches, emitted, state.tokens, state.first_position, requests.block_tables)
            count, row = emitted.count, jnp.arange(num_requests)
            column = jnp.arange(emitted.token_ids.shape[1])
            place = jnp.where(column < count[:, None], state.num_emitted[:, None] + column, state.emitted_ids.shape[1])
            emitted_ids = state.emitted_ids.at[row[:, None], place].set(emitted.token_ids, mode="drop")
            emitted_logprobs = state.emitted_logprobs.at[row[:, None], place].set(emitted.logprobs, mode="drop")
            emitted_experts = state.emitted_experts
            if emitted_experts is not None:
                emitted_experts = emitted_experts.at[row[:, None], place].set(experts[emitted.index], mode="drop")
            newest_column = jnp.maximum(count - 1, 0)
            newest = emitted.token_ids[row, newest_column]
            num_emitted = state.num_emitted + count
            is_stop = (newest[:, None] == requests.stop_ids).any(axis=1)
            ends = (count > 0) & (is_stop | (num_emitted >= requests.remaining))
            is_active = (count > 0) & ~ends
            newest_depth = state.tokens.depth[emitted.index[row, newest_column]]
            return LoopState(
                step=state.step + 1,
                caches=caches,
                tokens=_next_tokens(newest, is_active, shape) if loops else state.tokens,
                first_position=state.first_position + newest_depth + 1,
                last_tokens=jnp.where(is_active, row, -1),
                num_emitted=num_emitted,
                is_active=is_active,
                has_finished=ops.on_any_rank(ends.any()),
                emitted_ids=emitted_ids,
                emitted_logprobs=emitted_logprobs,
                emitted_experts=emitted_experts,
            )

        num_columns = (max_steps if loops else 1) + depth
        state = LoopState(
            step=jnp.int32(0),
            caches=caches,
            tokens=tokens,
            first_position=first_position,
            last_tokens=last_tokens,
            num_emitted=jnp.zeros(num_requests, jnp.int32),
            is_active=jnp.ones(num_requests, bool),
            has_finished=jnp.bool_(False),
            emitted_ids=jnp.zeros((num_requests, num_columns), jnp.int32),
            emitted_logprobs=jnp.zeros((num_requests, num_columns)),
            emitted_experts=jnp.zeros((num_requests, num_columns, num_words), jnp.int32) if num_words else None,
        )
        if loops:
            state = jax.lax.while_loop(
                lambda s: (s.step < packed[0]) & ops.on_any_rank(s.is_active.any()) & ~s.has_finished, advance, state
            )
        else:
            state = advance(state)
        logprob_bits = jax.lax.bitcast_convert_type(state.emitted_logprobs, jnp.int32)
        parts = [state.num_emitted[:, None], state.emitted_ids, logprob_bits]
        if state.emitted_experts is not None:
            parts.append(state.emitted_experts.reshape(num_requests, -1))
        table = jnp.concatenate(parts, axis=1)
        return state.caches, jnp.concatenate([state.step[None], table.reshape(-1)])

    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(
        on_each_rank(step, config, mesh),
        donate_argnums=1,
        out_shardings=None if mesh is None else by_rank(mesh),
        compiler_options=CPU_COMPILER_OPTIONS if platform == "cpu" else None,
    )


def _unpack(
    packed: Int32[Array, "_"], shape: StepShape
) -> tuple[Requests, Int32[Array, "R"], Tokens, Int32[Array, "R"]]:
    """Undo `core.packing.pack` on device; also the first positions and the last tokens."""
    table, tokens, last_tokens = packing.views(packed, shape)
    floats = jax.lax.bitcast_convert_type(table, jnp.float32)
    words = jax.lax.bitcast_convert_type(table, jnp.uint32)
    requests = Requests(
        remaining=table[:, packing.REMAINING],
        keys=words[:, packing.KEY_LOW : packing.KEY_HIGH + 1],
        top_k=table[:, packing.TOP_K],
        temperature=floats[:, packing.TEMPERATURE],
        top_p=floats[:, packing.TOP_P],
        stop_ids=table[:, packing.STOP_IDS : packing.NUM_FIELDS],
        block_tables=table[:, packing.NUM_FIELDS :],
    )
    columns = [tokens[:, i] for i in range(packing.TOKEN_FIELDS)]
    columns[packing.MASK] = jax.lax.bitcast_convert_type(columns[packing.MASK], jnp.uint32)
    return requests, table[:, packing.FIRST_POSITION], Tokens(*columns), last_tokens


def _next_tokens(newest: Int32[Array, "R"], is_active: Bool[Array, "R"], shape: StepShape) -> Tokens:
    """Query tokens of a plain decode step: request r's newest token in row r."""
    padding = shape.num_tokens - shape.num_requests
    limit, zeros = jnp.pad(is_active.astype(jnp.int32), (0, padding)), jnp.zeros(shape.num_tokens, jnp.int32)
    return Tokens(
        token_ids=jnp.pad(newest, (0, padding)),
        request=jnp.minimum(jnp.arange(shape.num_tokens), shape.num_requests - 1),
        offset=zeros,
        depth=zeros,
        limit=limit,
        mask=zeros.astype(jnp.uint32),
        parent=zeros - 1,
        column=limit - 1,
    )


def _pack_experts(expert_ids: list[Array]) -> Int32[Array, "T words"]:
    """Expert ids [T, K] of all MoE layers as int16, two in a word, the first in the low half."""
    ids = jnp.concatenate(expert_ids, axis=1).astype(jnp.int16)
    pairs = jnp.pad(ids, ((0, 0), (0, ids.shape[1] % 2))).reshape(len(ids), -1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.int32)


def _run_model(
    params: Params,
    caches: Caches,
    tokens: Tokens,
    first_position: Int32[Array, "R"],
    block_tables: Int32[Array, "R P"],
    *,
    config: DecoderConfig,
    shape: StepShape,
    ops: ParallelOps = ONE_DEVICE,
) -> tuple[Float[Array, "T M"], Caches, Int32[Array, "T words"] | None]:
    """One forward over the query tokens; returns their hidden states, the caches, and their experts if asked for."""
    num_rows, tile = shape.num_rows, shape.tile
    start = first_position[tokens.request]
    is_real = tokens.limit > 0
    slots = jnp.where(is_real, locate(block_tables, tokens.request, start + tokens.offset, caches[0].shape[1]), 0)
    limits = jnp.where(is_real, start + tokens.limit, 0)
    new_caches = list(caches)

    def attend(layer: int, queries: mla.MLAQueries, latent: Array, attention_params: Params) -> Array:
        cache = caches[layer]
        if padding := cache.shape[-1] - latent.shape[-1]:
            latent = jnp.pad(latent, ((0, 0), (0, padding)))
        cache = kv_update(cache, latent, slots)
        new_caches[layer] = cache
        absorbed = mla.absorb_queries(attention_params, queries)
        outputs = []
        for width, span in ((1, slice(0, num_rows)), (tile, slice(num_rows, shape.num_tokens))):
            if span.stop == span.start:
                continue
            owner = tokens.request[span][::width]
            trees = (first_position[owner] + 1, tokens.mask[span].reshape(-1, width)) if shape.has_trees else ()
            output = ops.attention(
                absorbed[span].reshape(-1, width, *absorbed.shape[1:]),
                cache,
                block_tables[owner],
                limits[span].reshape(-1, width),
                *trees,
                value_width=config.kv_lora_rank,
                scale=config.softmax_scale,
            )
            outputs.append(output.reshape(-1, *output.shape[2:]))
        return mla.unabsorb_values(attention_params, jnp.concatenate(outputs))

    expert_ids: list[Array] = []
    note_experts = None if shape.expert_ids is None else expert_ids.append
    positions = start + tokens.depth
    hidden = decoder.forward(
        params,
        config,
        tokens.token_ids,
        positions,
        attend,
        note_experts=note_experts,
        experts=ops.experts,
    )
    return hidden, new_caches, _pack_experts(expert_ids) if expert_ids else None
