"""Rows land in their slots, nothing else moves, and the cache is updated in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kv_update import kv_move, kv_update

PAGES, SIZE, WIDTH = 5, 4, 3


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_land_in_their_slots_and_nowhere_else(implementation):
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(PAGES, SIZE, WIDTH)).astype(np.float32)
    slots = np.array([7, 19, 4, 0, 0], np.int32)
    rows = rng.normal(size=(len(slots), WIDTH)).astype(np.float32)
    expected = cache.copy()
    for row, slot in zip(rows[:3], slots[:3], strict=True):
        expected[slot // SIZE, slot % SIZE] = row
    got = kv_update(jnp.asarray(cache), jnp.asarray(rows), jnp.asarray(slots), implementation=implementation)
    # Slot 0 is where padding goes: any of its rows may be there.
    np.testing.assert_array_equal(got[1:], expected[1:])
    np.testing.assert_array_equal(got[0, 1:], expected[0, 1:])
    assert any(np.array_equal(got[0, 0], row) for row in rows[3:])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_moved_rows_are_read_before_any_is_written(implementation):
    cache = np.arange(PAGES * SIZE * WIDTH, dtype=np.float32).reshape(PAGES, SIZE, WIDTH)
    sources, targets = np.array([9, 11, 14, 0], np.int32), np.array([8, 9, 10, 0], np.int32)
    expected = cache.reshape(-1, WIDTH).copy()
    expected[targets] = expected[sources]
    got = kv_move(jnp.asarray(cache), jnp.asarray(sources), jnp.asarray(targets), implementation=implementation)
    np.testing.assert_array_equal(got, expected.reshape(cache.shape))


def test_rows_are_cast_to_the_cache():
    cache = jnp.zeros((2, SIZE, WIDTH), jnp.bfloat16)
    assert kv_update(cache, jnp.ones((1, WIDTH)), jnp.array([5])).dtype == jnp.bfloat16


def test_a_donated_cache_is_not_copied():
    cache, rows, slots = jnp.zeros((PAGES, SIZE, WIDTH)), jnp.ones((2, WIDTH)), jnp.array([5, 9])
    before = cache.unsafe_buffer_pointer()
    after = jax.jit(kv_update, donate_argnums=0)(cache, rows, slots)
    assert after.unsafe_buffer_pointer() == before
    assert cache.is_deleted()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float8_holds_the_nearest_value_and_its_largest_one_beyond(implementation, dtype):
    """A plain cast makes NaN of what is larger."""
    rows = jnp.array([[0.3, -1.0, 448.0], [449.0, 1e9, -500.0]], dtype)
    assert jnp.isnan(rows.astype(jnp.float8_e4m3fn)).any()
    cache = jnp.zeros((2, SIZE, WIDTH), jnp.float8_e4m3fn)
    got = kv_update(cache, rows, jnp.array([5, 6]), implementation=implementation)
    expected = [[0.3125, -1, 448], [448, 448, -448]]
    np.testing.assert_array_equal(got[1, 1:3].astype(np.float32), expected)
    moved = kv_move(got, jnp.array([5, 6]), jnp.array([6, 7]), implementation=implementation)
    np.testing.assert_array_equal(moved[1, 2:].astype(np.float32), expected)
