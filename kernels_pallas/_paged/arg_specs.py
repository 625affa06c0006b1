"""Calls of paged attention at which its two operations are tested, compiled and measured."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas._paged.layout import FLOAT8


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call: as many tiles of query tokens, each with a table for so many context tokens."""

    tiles: int
    tokens: int
    context: int
    has_trees: bool = False


TINY_WORKS = {
    "decode": Work(tiles=4, tokens=1, context=128),
    "verify": Work(tiles=3, tokens=8, context=128, has_trees=True),
    "prefill": Work(tiles=2, tokens=16, context=128),
}


def call_args(
    work: Work, query: tuple[int, int], cache: tuple[int, int, int], dtype: str, cache_dtype: str
) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Shapes of one call's arrays.

    Args:
        work: The call.
        query: Heads of one device and their width.
        cache: Pages, rows a page, row width.
        dtype: Of the queries.
        cache_dtype: Of the cache.

    Returns:
        q, cache, block_tables, limits, tree_start, tree_mask; the last two None without trees.
    """
    rows = (work.tiles, work.tokens)
    trees = (_int((work.tiles,)), jax.ShapeDtypeStruct(rows, jnp.uint32)) if work.has_trees else (None, None)
    return (
        jax.ShapeDtypeStruct((*rows, *query), dtype),
        jax.ShapeDtypeStruct(cache, cache_dtype),
        _int((work.tiles, work.context // cache[1])),
        _int(rows),
        *trees,
    )


def float8_suffix(cache_dtype: str) -> str:
    """What the name of a call with a cache of this type ends in."""
    return "-fp8" if cache_dtype == FLOAT8 else ""


def _int(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
