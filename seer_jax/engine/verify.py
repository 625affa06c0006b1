"""Verification of drafts on device: which drafted tokens the model says itself, and where their KV belongs.

A draft is a point mass, so verification is exact and simple: after every token of the tree the model draws with the
key of that position; the walk starts at the newest known token and goes to the child that carries what was drawn, until
none does. The tokens drawn along the walk are those of plain decoding (docs/drafting.md).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from kernels_pallas.kv_update import kv_move


class Tokens(NamedTuple):
    """The query tokens of a step, see `core.packing`; T tokens."""

    token_ids: Int32[Array, "T"]
    request: Int32[Array, "T"]
    offset: Int32[Array, "T"]
    depth: Int32[Array, "T"]
    limit: Int32[Array, "T"]
    mask: UInt32[Array, "T"]
    parent: Int32[Array, "T"]
    column: Int32[Array, "T"]


class Emitted(NamedTuple):
    """What the requests of a step say; C = longest path + 1.

    Attributes:
        count: Tokens emitted; 0 for a request that draws none.
        token_ids: The first `count` of a row.
        logprobs: Theirs.
        index: Query token after which each was drawn.
    """

    count: Int32[Array, "R"]
    token_ids: Int32[Array, "R C"]
    logprobs: Float32[Array, "R C"]
    index: Int32[Array, "R C"]


def walk(
    drawn: Int32[Array, "T"],
    logprobs: Float32[Array, "T"],
    tokens: Tokens,
    stop_ids: Int32[Array, "R stops"],
    remaining: Int32[Array, "R"],
    max_depth: int,
) -> Emitted:
    """Follow what was drawn down every request's tree.

    Args:
        drawn: What the model says after each query token.
        logprobs: Theirs.
        tokens: The query tokens.
        stop_ids: Tokens that end each request; nothing after one is accepted.
        remaining: Tokens that each request may emit at most.
        max_depth: Longest path.
    """
    num_requests = stop_ids.shape[0]
    parent = jnp.maximum(tokens.parent, 0)
    stops = (drawn[:, None] == stop_ids[tokens.request]).any(axis=1)
    follows = (tokens.parent >= 0) & (drawn[parent] == tokens.token_ids) & ~stops[parent]
    follows &= tokens.column < remaining[tokens.request]
    is_root = tokens.column == 0
    is_accepted = is_root
    for _ in range(max_depth):
        is_accepted = is_root | (follows & is_accepted[parent])
    row = jnp.where(is_accepted, tokens.request, num_requests)
    column = jnp.maximum(tokens.column, 0)
    shape = (num_requests, max_depth + 1)
    index = jnp.zeros(shape, jnp.int32).at[row, column].set(jnp.arange(len(drawn), dtype=jnp.int32), mode="drop")
    count = jnp.zeros(num_requests, jnp.int32).at[row].add(1, mode="drop")
    return Emitted(count, drawn[index], logprobs[index], index)


def move_accepted(
    caches: list[Array],
    emitted: Emitted,
    tokens: Tokens,
    first_position: Int32[Array, "R"],
    block_tables: Int32[Array, "R P"],
) -> list[Array]:
    """Move the KV of accepted nodes from their places in the tree to their positions, in all layers.

    Args:
        caches: One array [pages, page size, width] per layer.
        emitted: The walk.
        tokens: The query tokens.
        first_position: Position, and slot, of every request's newest token.
        block_tables: Pages of every request.
    """
    num_requests, num_columns = emitted.index.shape
    request, page_size = jnp.arange(num_requests)[:, None], caches[0].shape[1]
    # The node of column c >= 1 is a draft; its parent drew the token at position first + c.
    node, depth = emitted.index[:, 1:], jnp.arange(1, num_columns)
    moves = (depth < emitted.count[:, None]) & (tokens.offset[node] != tokens.depth[node])
    first = first_position[:, None]
    source = jnp.where(moves, locate(block_tables, request, first + tokens.offset[node], page_size), 0).reshape(-1)
    target = jnp.where(moves, locate(block_tables, request, first + tokens.depth[node], page_size), 0).reshape(-1)
    return [kv_move(cache, source, target) for cache in caches]


def locate(block_tables: Array, request: Array, slot: Array, page_size: int) -> Array:
    """Rows of the flat cache at which slots of requests lie; slots past the block table stay inside it."""
    page = jnp.minimum(slot // page_size, block_tables.shape[1] - 1)
    return block_tables[request, page] * page_size + slot % page_size
