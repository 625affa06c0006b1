"""Paged grouped-query attention equals float64 attention over each request's own keys and values."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import _dispatch
from kernels_pallas._paged.mask import MASK_BITS
from kernels_pallas.gqa_attention import gqa_attention, join_kv
from kernels_pallas.kv_update import kv_update
from kernels_pallas.mla_attention import mla_attention
from tests.quick import quick_jit

HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES, TOKENS, SCALE = 6, 2, 5, 4, 40, 4, 0.4
LENGTHS = (0, 1, PAGE, 5, 127, 128, 129, PAGE * PAGES)
STARTS = (1, 6, 95, 96, 97, 127, 128, 17)
GARBAGE = 1e4
"""In every slot that nobody may see."""


def make_case(lengths, dtype=np.float32, is_tree=False):
    """Queries, keys and values [tile, slot, ...] of requests of these lengths, and the cache that holds them.

    Rows are the last tokens of each; in a tree, nodes of one that starts there, anywhere in the slots of a mask.
    """
    rng = np.random.default_rng(0)
    tiles, row, lengths = len(lengths), np.arange(TOKENS), np.array(lengths)[:, None]
    keys, values = rng.normal(size=(2, tiles, PAGES * PAGE, KV_HEADS, HEAD_DIM)).astype(dtype)
    count = np.minimum(lengths, TOKENS)
    limits = np.where(row < count, lengths - count + row + 1, 0)
    trees = []
    if is_tree:
        limits = np.broadcast_to(lengths, limits.shape).copy()
        masks = np.zeros(limits.shape, np.uint32)
        for n in range(tiles):
            for t, place in enumerate((3, 8, MASK_BITS - 1), start=1):
                masks[n, t] = masks[n, rng.integers(t)] | np.uint32(1 << place)
        limits[-1], masks[-1] = 0, 0
        trees = [lengths[:, 0].astype(np.int32), masks]
        lengths = lengths + MASK_BITS
    tables = rng.permutation(np.arange(1, tiles * PAGES + 1)).reshape(tiles, PAGES).astype(np.int32)
    pages = np.full((tiles * PAGES + 1, PAGE, 2 * KV_HEADS * HEAD_DIM), GARBAGE, dtype)
    for n, length in enumerate(lengths[:, 0]):
        rows = pages[tables[n]].reshape(PAGES * PAGE, -1)
        rows[:length] = np.asarray(join_kv(jnp.asarray(keys[n]), jnp.asarray(values[n])))[:length]
        pages[tables[n]] = rows.reshape(PAGES, PAGE, -1)
    q = rng.normal(size=(tiles, TOKENS, HEADS, HEAD_DIM)).astype(dtype)
    return [q, pages, tables, limits.astype(np.int32), *trees], keys, values


def exact(case, keys, values):
    """The definition, in float64 loops."""
    q, _, _, limits, *trees = case
    out = np.zeros(q.shape)
    for n, t in np.argwhere(limits > 0):
        seen = list(range(limits[n, t]))
        if trees:
            seen += [trees[0][n] + bit for bit in range(MASK_BITS) if int(trees[1][n, t]) >> bit & 1]
        for h in range(HEADS):
            of = h // (HEADS // KV_HEADS)
            scores = keys[n, seen, of].astype(np.float64) @ q[n, t, h].astype(np.float64) * SCALE
            weights = np.exp(scores - scores.max())
            out[n, t, h] = weights / weights.sum() @ values[n, seen, of].astype(np.float64)
    return out


@cache
def attend_with(implementation):
    return quick_jit(lambda *arrays: gqa_attention(*arrays, scale=SCALE, implementation=implementation))


def attend(implementation, case):
    return np.asarray(attend_with(implementation)(*map(jnp.asarray, case)), np.float32)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("is_tree", [False, True], ids=["ragged contexts", "trees"])
def test_equals_float64_attention_and_is_zero_where_no_row_is(implementation, is_tree):
    case, *kv = make_case(STARTS if is_tree else LENGTHS, is_tree=is_tree)
    got = attend(implementation, case)
    np.testing.assert_allclose(got, exact(case, *kv), atol=3e-6)
    assert not got[case[3] == 0].any()


@pytest.mark.parametrize("wrong", ["causal", "start", "mask", "limit", "heads"])
def test_the_comparison_notices_what_is_wrong(wrong):
    case, *kv = make_case(STARTS, is_tree=True)
    q, pages, tables, limits, starts, masks = case
    if wrong == "causal":
        limits, masks = limits + (limits > 0) * np.arange(TOKENS, dtype=np.int32), np.zeros_like(masks)
    elif wrong == "start":
        starts = starts + 1
    elif wrong == "mask":
        masks = masks & ~np.uint32(8)
    elif wrong == "limit":
        limits = np.maximum(limits - 1, 0)
    else:
        q = q.reshape(*q.shape[:2], -1, KV_HEADS, HEAD_DIM).swapaxes(2, 3).reshape(q.shape)
    got = attend("xla", [q, pages, tables, limits, starts, masks])
    assert np.abs(got - exact(case, *kv)).max() > 0.1


def test_bfloat16_accumulates_in_float32():
    case, *kv = make_case(LENGTHS, dtype=jnp.bfloat16)
    np.testing.assert_allclose(attend("xla", case), exact(case, *kv), atol=0.03)


def test_one_kv_head_whose_value_is_its_key_is_latent_attention():
    case, keys, _ = make_case(LENGTHS)
    q, pages, *rest = case
    latents = keys.reshape(len(q), -1, KV_HEADS * HEAD_DIM)
    q = np.concatenate([q, q], axis=-1)
    cache = np.full((*pages.shape[:2], 2 * latents.shape[2]), GARBAGE, np.float32)
    for n in range(len(q)):
        rows = np.asarray(join_kv(*(jnp.asarray(latents[n][:, None]),) * 2))
        cache[rest[0][n]] = rows.reshape(PAGES, PAGE, -1)
    latent_cache = cache[:, :, : q.shape[3]]
    got = quick_jit(lambda *a: gqa_attention(*a, scale=SCALE, implementation="xla"))(q, cache, *rest)
    of_latents = quick_jit(
        lambda *a: mla_attention(*a, value_width=q.shape[3], scale=SCALE, implementation="reference")
    )(q, latent_cache, *rest)
    np.testing.assert_allclose(got, of_latents, atol=3e-6)


def test_a_token_is_one_row_of_the_cache_key_and_value_of_each_head_in_turn():
    keys, values = np.arange(12.0).reshape(2, 2, 3), 100 + np.arange(12.0).reshape(2, 2, 3)
    rows = join_kv(jnp.asarray(keys), jnp.asarray(values))
    np.testing.assert_array_equal(rows[1], [6, 7, 8, 106, 107, 108, 9, 10, 11, 109, 110, 111])
    cache = kv_update(jnp.zeros((2, PAGE, 12)), rows, jnp.array([5, 6]))
    np.testing.assert_array_equal(cache[1, 1:3], rows)


def test_rows_that_are_no_whole_heads_are_refused():
    case, *_ = make_case(LENGTHS)
    q, pages, *rest = map(jnp.asarray, case)
    with pytest.raises(ValueError, match="rows of 19 are not keys and values of heads of 5"):
        gqa_attention(q, pages[:, :, :-1], *rest, scale=SCALE)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads"):
        gqa_attention(q[:, :, :-1], pages, *rest, scale=SCALE)


def test_a_call_that_the_kernel_cannot_serve_on_tpu_goes_to_xla_visibly(monkeypatch):
    case, *_ = make_case(LENGTHS)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"gqa_attention: xla serves instead, .* key and value are 10 wide"):
        got = quick_jit(lambda *a: gqa_attention(*a, scale=SCALE))(*map(jnp.asarray, case))
    np.testing.assert_array_equal(got, attend("xla", case))
