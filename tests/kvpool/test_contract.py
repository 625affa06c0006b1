"""What every KV pool promises, whatever it is made of."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from seer_jax.kvpool import EmbeddedKVPool, KVPool, MooncakeKVPool, Status
from seer_jax.kvpool.mooncake_client import MIN_SEGMENT_BYTES
from tests.kvpool import mooncake_master
from tests.kvpool.blocks import get, make_block, make_key, put

HIT, MISS, STORED, CORRUPT, NO_SPACE = Status.HIT, Status.MISS, Status.STORED, Status.CORRUPT, Status.NO_SPACE

NUM_FIT = 16
"""Blocks of 8 KiB that a pool of this suite holds at least."""


@dataclass(frozen=True)
class Backend:
    """How a pool of at least `NUM_FIT` blocks is opened, and what it promises beyond what a cache can.

    Attributes:
        open: From a directory of its own and pytest's request, for fixtures.
        keeps: It says what it evicts, keeps what has priority, and knows what it holds. A cache without it may lose
            any block at any time.
    """

    open: Callable[[Path, pytest.FixtureRequest], KVPool]
    keeps: bool = True


def open_mooncake(path: Path, request: pytest.FixtureRequest) -> KVPool:
    return MooncakeKVPool(
        mooncake_master.shared_master().address,
        namespace="contract",
        segment_bytes=MIN_SEGMENT_BYTES,
        buffer_bytes=512 << 10,
        timeout_s=5.0,
    )


BACKENDS = {
    "dram": Backend(lambda path, request: EmbeddedKVPool(NUM_FIT * 8192)),
    "dram_and_disk": Backend(
        lambda path, request: EmbeddedKVPool(
            4 * 8192, directory=path, max_disk_bytes=2 * NUM_FIT * 8192, segment_bytes=30_000
        )
    ),
    "mostly_disk": Backend(
        lambda path, request: EmbeddedKVPool(
            8192, directory=path, max_disk_bytes=3 * NUM_FIT * 8192, segment_bytes=10_000
        )
    ),
    "ray": Backend(lambda path, request: request.getfixturevalue("ray_pool")),
    "mooncake": Backend(open_mooncake, keeps=False),
}


def params(names):
    marks = {"mooncake": mooncake_master.NEEDED, "ray": pytest.mark.ray}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@pytest.fixture(params=params(BACKENDS))
def pool(request, tmp_path):
    pool = BACKENDS[request.param].open(tmp_path, request)
    yield pool
    pool.close()


@pytest.fixture(params=params(name for name, backend in BACKENDS.items() if backend.keeps))
def keeping_pool(request, tmp_path):
    pool = BACKENDS[request.param].open(tmp_path, request)
    yield pool
    pool.close()


def test_it_is_a_pool(pool):
    assert isinstance(pool, KVPool)


def test_what_was_put_comes_back(pool):
    assert put(pool, range(10)) == [STORED] * 10
    assert pool.contains([make_key(3), make_key(77)]) == [True, False]
    assert get(pool, [*range(10), 77]) == [HIT] * 10 + [MISS]
    stats = pool.stats()
    assert (stats.num_stored, stats.num_hits, stats.num_misses) == (10, 10, 1)


def test_a_pool_that_keeps_blocks_counts_them(keeping_pool):
    put(keeping_pool, range(10))
    keeping_pool.drop([make_key(3)])
    assert keeping_pool.stats().num_blocks == 9


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3b11fnuz])
def test_arrays_of_any_type_and_shape_keep_their_bits(pool, dtype):
    # One request's pages: layers, pages, page size, row width; a size that fills no memory page exactly.
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 40), np.uint8).view(dtype)
    array.flags.writeable = False
    out = np.empty_like(array)
    assert pool.put_blocks([make_key(0)], [array]) == [STORED]
    assert pool.get_blocks([make_key(0)], [out]) == [HIT]
    assert out.tobytes() == array.tobytes()


def test_the_buffer_is_the_callers_again_after_a_put(pool):
    array = make_block(1).copy()
    pool.put_blocks([make_key(1)], [array])
    array[:] = 0
    assert get(pool, [1]) == [HIT]


def test_a_key_put_again_keeps_the_first_bytes(pool):
    assert put(pool, [1, 1]) == [STORED] * 2
    assert pool.put_blocks([make_key(1)], [make_block(2)]) == [STORED]
    assert get(pool, [1]) == [HIT]
    assert pool.stats().num_stored == 1


def test_a_block_of_another_shape_or_type_is_not_handed_out(pool):
    put(pool, [1])
    outs = [np.zeros(8192, np.uint8), np.zeros((2, 4096), np.int8), np.zeros((2, 2048), np.uint8)]
    assert pool.get_blocks([make_key(1)] * 3, outs) == [CORRUPT] * 3
    assert not any(out.any() for out in outs)
    assert get(pool, [1]) == [HIT]


@pytest.mark.parametrize("bit", [0, 1, 8 * 8191 + 7])
def test_a_flipped_bit_is_found_once_and_the_block_can_be_put_again(pool, bit):
    put(pool, range(5))
    assert pool.flip_bit(make_key(2), bit)
    assert get(pool, range(5)) == [HIT, HIT, CORRUPT, HIT, HIT]
    assert get(pool, [2]) == [MISS]
    assert pool.stats().num_corrupt == 1
    assert put(pool, [2]) == [STORED]
    assert get(pool, [2]) == [HIT]
    assert not pool.flip_bit(make_key(9), bit)


def test_dropped_blocks_are_gone(pool):
    put(pool, range(3))
    pool.drop([make_key(0), make_key(1), make_key(9)])
    assert get(pool, range(3)) == [MISS, MISS, HIT]


def test_dropped_blocks_are_not_counted(keeping_pool):
    pool = keeping_pool
    put(pool, range(3))
    pool.drop([make_key(0), make_key(1), make_key(9)])
    assert pool.stats().num_blocks == 1


def test_old_epochs_are_dropped_as_a_whole(pool):
    for epoch in range(3):
        put(pool, range(4), epoch=epoch)
    assert pool.drop_epochs_before(2) == 8
    assert get(pool, range(4), epoch=1) == [MISS] * 4
    assert get(pool, range(4), epoch=2) == [HIT] * 4
    assert pool.drop_epochs_before(2) == 0


def test_more_than_fits_evicts_and_stays_within_bounds(keeping_pool):
    pool = keeping_pool
    assert put(pool, range(100)) == [STORED] * 100
    stats = pool.stats()
    assert stats.num_evicted > 0
    assert stats.dram_bytes <= stats.max_dram_bytes
    assert stats.disk_bytes <= stats.max_disk_bytes
    assert get(pool, [99]) == [HIT]
    # What is written to disk in the meantime may evict more.
    num_hits = get(pool, range(100)).count(HIT)
    assert pool.stats().num_blocks <= num_hits <= stats.num_blocks


def test_the_lowest_priority_goes_first(keeping_pool):
    pool = keeping_pool
    put(pool, range(4), priority=1.0)
    put(pool, range(100, 160))
    assert get(pool, range(4)) == [HIT] * 4


def test_a_block_larger_than_the_pool_is_refused_and_disturbs_nothing(pool):
    put(pool, range(4))
    assert put(pool, [50], num_bytes=1 << 20) == [NO_SPACE]
    assert get(pool, range(4)) == [HIT] * 4


def test_bad_buffers_are_refused_before_anything_is_stored(pool):
    good = make_block(0).copy()
    for bad in (good[:, ::2], np.array([object()]), good.view(">u2"), np.zeros(1, "i4,i4")):
        with pytest.raises(ValueError, match="KV blocks are"):
            pool.put_blocks([make_key(0), make_key(1)], [good, bad])
    with pytest.raises(ValueError, match="2 keys"):
        pool.put_blocks([make_key(0), make_key(1)], [good])
    with pytest.raises(ValueError, match="number"):
        pool.put_blocks([make_key(0)], [good], priority=float("nan"))
    assert pool.contains([make_key(0)]) == [False]
    put(pool, [0])
    good.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        pool.get_blocks([make_key(0)], [good])


def test_threads_never_see_wrong_bytes(pool):
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                names = [int(name) for name in rng.integers(0, 40, 3)]
                action = rng.integers(0, 5)
                if action < 2:
                    assert set(put(pool, names)) <= {STORED, NO_SPACE}
                elif action < 4:
                    assert set(get(pool, names)) <= {HIT, MISS}
                else:
                    pool.drop([make_key(names[0])])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = pool.stats()
    assert (stats.num_corrupt, stats.num_timeouts, stats.num_disk_errors) == (0, 0, 0)


def test_a_closed_pool_is_empty_and_closes_again(pool):
    put(pool, range(3))
    pool.close()
    assert get(pool, range(3)) == [MISS] * 3
    assert put(pool, [1]) == [NO_SPACE]
    pool.close()
