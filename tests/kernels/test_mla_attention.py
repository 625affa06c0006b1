"""Paged latent attention equals float64 attention over each request's own rows, whatever lies elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.mla_attention import MASK_BITS, mla_attention
from seer_jax.config.validate import MAX_DRAFT_TOKENS
from tests.quick import quick_jit

HEADS, WIDTH, VALUE, PAGE, SCALE = 3, 12, 8, 4, 0.3


def make_case(lengths, tile, pages, dtype=np.float32):
    """Queries are the last tokens of contexts of the given lengths; foreign pages hold huge values."""
    rng = np.random.default_rng(0)
    tiles = len(lengths)
    cache = rng.normal(size=(tiles * pages + 1, PAGE, WIDTH))
    cache[0] = 1e4
    tables = rng.permutation(np.arange(1, tiles * pages + 1)).reshape(tiles, pages).astype(np.int32)
    count = np.minimum(lengths, tile)[:, None]
    limits = np.where(np.arange(tile) < count, np.array(lengths)[:, None] - count + np.arange(tile) + 1, 0)
    for n, length in enumerate(lengths):
        rows = cache[tables[n]].reshape(-1, WIDTH)
        rows[length:] = 1e4
        cache[tables[n]] = rows.reshape(pages, PAGE, WIDTH)
    q = rng.normal(size=(tiles, tile, HEADS, WIDTH))
    return q.astype(dtype), cache.astype(dtype), tables, limits.astype(np.int32)


def make_tree_case(tile=8, pages=75):
    """Rows are nodes of random trees that start at these slots; the first sees no tree yet. A last tile is padding."""
    starts = np.array([1, 6, 127, 128, 250, 17], np.int32)
    rng = np.random.default_rng(1)
    q, cache, tables, limits = make_case(starts + 32, tile, pages)
    limits = np.broadcast_to(starts[:, None], limits.shape).astype(np.int32).copy()
    masks = np.zeros(limits.shape, np.uint32)
    for n in range(len(starts)):
        for t in range(1, tile):
            parent = rng.integers(t)
            # Nodes may lie anywhere in the 32 slots, also in the last.
            masks[n, t] = masks[n, parent] | np.uint32(1 << (31 if t == tile - 1 else 3 * t))
    limits[-1], masks[-1] = 0, 0
    return q, cache, tables, limits, starts, masks


def exact(q, cache, tables, limits, starts=None, masks=None):
    """The definition, in float64 loops."""
    out = np.zeros((*q.shape[:3], VALUE))
    for n, t in np.argwhere(limits > 0):
        seen = list(range(limits[n, t]))
        if masks is not None:
            seen += [starts[n] + bit for bit in range(32) if int(masks[n, t]) >> bit & 1]
        rows = cache[tables[n]].reshape(-1, WIDTH)[seen].astype(np.float64)
        for h in range(HEADS):
            scores = rows @ q[n, t, h].astype(np.float64) * SCALE
            weights = np.exp(scores - scores.max())
            out[n, t, h] = weights / weights.sum() @ rows[:, :VALUE]
    return out


def attend(implementation, *arrays):
    return quick_jit(lambda *a: mla_attention(*a, value_width=VALUE, scale=SCALE, implementation=implementation))(
        *map(jnp.asarray, arrays)
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("lengths", "tile"),
    [((1, 5, 16, 20), 1), ((20, 3, 8), 8), ((0, 7, 1, 0), 4)],
    ids=["decode", "prefill slices", "padding tiles"],
)
def test_equals_float64_attention(implementation, lengths, tile):
    case = make_case(lengths, tile, pages=5)
    np.testing.assert_allclose(attend(implementation, *case), exact(*case), atol=3e-6)


def test_long_contexts_beside_short_ones():
    case = make_case((1, 299, 128, 129, 0, 6, 257, 300), 2, pages=75)
    np.testing.assert_allclose(attend("xla", *case), exact(*case), atol=3e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nodes_of_a_tree_see_the_context_their_ancestors_and_themselves(implementation):
    case = make_tree_case()
    np.testing.assert_allclose(attend(implementation, *case), exact(*case), atol=3e-6)


@pytest.mark.parametrize("wrong", ["causal", "start", "mask"])
def test_the_comparison_notices_a_wrong_tree(wrong):
    q, cache, tables, limits, starts, masks = case = make_tree_case()
    if wrong == "causal":
        got = attend("xla", q, cache, tables, limits + (limits > 0) * np.arange(8, dtype=np.int32))
    elif wrong == "start":
        got = attend("xla", q, cache, tables, limits, starts + 1, masks)
    else:
        got = attend("xla", q, cache, tables, limits, starts, masks & ~(masks >> 3))
    assert np.abs(got - exact(*case)).max() > 0.1


@pytest.mark.parametrize("tile", [1, 4])
def test_a_tile_keeps_its_bits_among_others_and_at_another_place(tile):
    q, cache, tables, limits = make_case((200, 5, 16, 129, 3, 4, 300), tile, pages=75)
    out = attend("xla", q, cache, tables, limits)
    order = np.random.default_rng(1).permutation(len(q))
    np.testing.assert_array_equal(attend("xla", q[order], cache, tables[order], limits[order]), out[order])
    shorter = np.where(np.arange(len(q))[:, None] == 0, limits, limits // 2)
    np.testing.assert_array_equal(attend("xla", q, cache, tables, shorter)[0], out[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_not_in_use_are_zero(implementation):
    case = make_case((0, 2), 4, pages=2)
    out = np.asarray(attend(implementation, *case))
    assert not out[0].any()
    assert not out[1, 2:].any()
    assert out[1, :2].all()


def test_bfloat16_accumulates_in_float32():
    case = make_case((20, 13), 1, pages=5, dtype=jnp.bfloat16)
    out = attend("xla", *case)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), exact(*case), atol=0.03)


def test_the_comparison_notices_one_position_too_many():
    q, cache, tables, limits = make_case((9, 14), 1, pages=5)
    assert np.abs(attend("xla", q, cache, tables, limits + 1) - exact(q, cache, tables, limits)).max() > 0.1


def test_a_mask_has_a_bit_for_every_draft_token_that_the_configuration_allows():
    assert MASK_BITS == MAX_DRAFT_TOKENS == np.iinfo(np.uint32).bits
