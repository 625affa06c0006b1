"""The embedded pool and its files: recovery, torn writes, full disks, back-pressure."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.kvpool import EmbeddedKVPool, Status, segments
from seer_jax.kvpool.blocks import HEADER_BYTES
from seer_jax.kvpool.spill import Spiller
from tests.kvpool.blocks import get, make_key, put

HIT, MISS, STORED, CORRUPT = Status.HIT, Status.MISS, Status.STORED, Status.CORRUPT
RECORD = HEADER_BYTES + 8192


def open_pool(path, dram_blocks=4, max_disk_bytes=64 * RECORD, segment_bytes=4 * RECORD, **options):
    options |= {"max_disk_bytes": max_disk_bytes, "segment_bytes": segment_bytes}
    return EmbeddedKVPool(dram_blocks * 8192, directory=path, **options)


def files_in(path):
    return sorted(path.glob("*.kvseg"))


def fill(path, names, **options):
    """A directory with these blocks, left behind by a pool."""
    pool = open_pool(path, **options)
    assert put(pool, names) == [STORED] * len(names)
    assert pool.flush()
    pool.close()


def test_a_pool_opened_again_has_what_was_flushed(tmp_path):
    fill(tmp_path, range(10))
    pool = open_pool(tmp_path)
    assert pool.stats().num_recovered == 10
    assert get(pool, range(11)) == [HIT] * 10 + [MISS]
    assert put(pool, range(20)) == [STORED] * 20
    assert get(pool, range(20)) == [HIT] * 20
    pool.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_file_torn_at_any_byte_loses_only_what_lies_behind(tmp_path, seed):
    fill(tmp_path, range(3))
    (file,) = files_in(tmp_path)
    data = file.read_bytes()
    cuts = np.random.default_rng(seed).integers(0, len(data), 8)
    for cut in [0, 1, HEADER_BYTES, RECORD - 1, RECORD, RECORD + 1, *map(int, cuts)]:
        file.write_bytes(data[:cut])
        pool = open_pool(tmp_path)
        whole = cut // RECORD
        assert get(pool, range(3)) == [HIT] * whole + [MISS] * (3 - whole)
        assert pool.stats().truncated_bytes == cut - whole * RECORD
        pool.close()
        assert [kept.stat().st_size for kept in files_in(tmp_path) if kept.stat().st_size] == [whole * RECORD] * (
            cut >= RECORD
        )


@pytest.mark.parametrize("seed", range(3))
def test_a_bit_flipped_while_the_pool_was_closed_never_comes_out(tmp_path, seed):
    fill(tmp_path, range(3))
    (file,) = files_in(tmp_path)
    data = file.read_bytes()
    for position in map(int, np.random.default_rng(seed).integers(0, len(data), 8)):
        bad = bytearray(data)
        bad[position] ^= 1 << position % 8
        file.write_bytes(bad)
        pool = open_pool(tmp_path)
        assert get(pool, range(3)) == [HIT] * (position // RECORD) + [MISS] * (3 - position // RECORD)
        pool.close()


def test_a_file_cut_under_an_open_pool_is_corrupt_not_a_crash(tmp_path):
    pool = open_pool(tmp_path, dram_blocks=1)
    put(pool, range(6))
    os.truncate(files_in(tmp_path)[0], 100)
    assert CORRUPT in get(pool, range(6))
    assert get(pool, [0]) == [MISS]
    pool.close()


def test_two_pools_cannot_share_a_directory(tmp_path):
    pool = open_pool(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        open_pool(tmp_path)
    pool.close()
    open_pool(tmp_path).close()


def test_sizes_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="4 segments"):
        EmbeddedKVPool(1 << 20, directory=tmp_path)
    with pytest.raises(ConfigError, match="negative"):
        EmbeddedKVPool(-1)


def test_files_of_dropped_epochs_are_deleted(tmp_path):
    pool = open_pool(tmp_path)
    put(pool, range(20), epoch=0)
    assert pool.flush()
    put(pool, range(3), epoch=1)
    pool.drop_epochs_before(1)
    # The thread deletes before it writes.
    assert pool.flush()
    assert pool.stats().disk_bytes <= 4 * RECORD
    assert get(pool, range(3), epoch=1) == [HIT] * 3
    pool.close()
    assert sum(file.stat().st_size for file in files_in(tmp_path)) <= 4 * RECORD


def test_live_blocks_of_mostly_dead_files_are_moved_not_lost(tmp_path):
    pool = open_pool(tmp_path, dram_blocks=1, max_disk_bytes=16 * RECORD)
    dear = [name for name in range(100) if name % 12 == 0]
    for name in range(100):
        assert put(pool, [name], priority=float(name in dear)) == [STORED]
    assert get(pool, dear) == [HIT] * len(dear)
    assert pool.stats().disk_bytes <= 16 * RECORD
    assert pool.stats().num_spilled > 100
    pool.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_costs_blocks_but_raises_nothing(tmp_path, monkeypatch, number):
    pool = open_pool(tmp_path)
    put(pool, range(12))
    assert pool.flush()
    real = os.pwrite

    def refuse(fd, data, offset):
        real(fd, data[: len(data) // 2], offset)
        raise OSError(number, "refused")

    monkeypatch.setattr(segments.os, "pwrite", refuse)
    assert put(pool, range(100, 140)) == [STORED] * 40
    assert get(pool, [139]) == [HIT]
    assert pool.stats().num_evicted > 0
    assert pool.stats().num_disk_errors > 0
    assert sum(file.stat().st_size for file in files_in(tmp_path)) == pool.stats().disk_bytes
    monkeypatch.undo()
    assert put(pool, range(200, 220)) == [STORED] * 20
    assert get(pool, range(200, 220)) == [HIT] * 20
    pool.flush()
    pool.close()
    pool = open_pool(tmp_path)
    assert pool.stats().truncated_bytes == 0
    assert get(pool, range(200, 220)) == [HIT] * 20
    pool.close()


def test_blocks_worth_more_outlive_a_disk_that_refuses(tmp_path, monkeypatch):
    pool = open_pool(tmp_path, put_timeout_s=5.0)
    put(pool, range(4), priority=1.0)

    def refuse(fd, data, offset):
        raise OSError(errno.ENOSPC, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "pwrite", refuse)
        assert put(pool, [10]) == [Status.NO_SPACE]
        assert get(pool, range(4)) == [HIT] * 4
    assert put(pool, [10]) == [STORED]
    assert get(pool, [*range(4), 10]) == [HIT] * 5
    pool.close()


def test_memory_full_of_blocks_worth_more_says_so():
    pool = EmbeddedKVPool(4 * 8192)
    assert put(pool, range(4), priority=1.0) == [STORED] * 4
    assert put(pool, [10]) == [Status.NO_SPACE]
    assert get(pool, range(4)) == [HIT] * 4
    assert put(pool, [10], priority=1.0) == [STORED]
    stats = pool.stats()
    assert (stats.num_blocks, stats.num_evicted, stats.dram_bytes, stats.peak_dram_bytes) == (4, 1, 32768, 32768)


def test_a_full_disk_keeps_what_is_worth_more_than_what_comes(tmp_path):
    pool = open_pool(tmp_path, max_disk_bytes=24 * RECORD)
    assert put(pool, range(20), priority=1.0) == [STORED] * 20
    assert pool.flush()
    put(pool, range(100, 160))
    assert get(pool, range(20)) == [HIT] * 20
    pool.close()


def test_a_block_can_be_read_while_its_file_is_deleted(tmp_path, monkeypatch):
    pool = open_pool(tmp_path, dram_blocks=1)
    put(pool, range(3))
    num_open = len(os.listdir("/proc/self/fd"))
    started, gate, real = threading.Event(), threading.Event(), os.preadv

    def slow(fd, buffers, offset):
        started.set()
        gate.wait()
        return real(fd, buffers, offset)

    monkeypatch.setattr(segments.os, "preadv", slow)
    statuses = []
    reader = threading.Thread(target=lambda: statuses.extend(get(pool, [0])))
    reader.start()
    started.wait()
    pool.drop([make_key(name) for name in range(3)])
    wait_until(lambda: pool.stats().disk_bytes == 0 and not files_in(tmp_path))
    gate.set()
    reader.join()
    assert statuses == [HIT]
    assert len(os.listdir("/proc/self/fd")) == num_open - 1
    pool.close()


def test_a_block_dropped_while_it_is_written_leaves_nothing(tmp_path, monkeypatch):
    pool = open_pool(tmp_path)
    started, gate, real = threading.Event(), threading.Event(), os.pwrite

    def slow(fd, data, offset):
        started.set()
        gate.wait()
        return real(fd, data, offset)

    monkeypatch.setattr(segments.os, "pwrite", slow)
    put(pool, range(4))
    started.wait()
    pool.drop([make_key(name) for name in range(4)])
    put(pool, [0])
    gate.set()
    assert pool.flush()
    assert get(pool, range(4)) == [HIT] + [MISS] * 3
    pool.drop([make_key(0)])
    wait_until(lambda: pool.stats().disk_bytes == 0)
    assert pool.stats().dram_bytes == 0
    pool.close()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_put_waits_for_a_slow_disk_and_gives_up_in_time(tmp_path, monkeypatch):
    pool = open_pool(tmp_path, put_timeout_s=0.3)
    gate, real = threading.Event(), os.pwrite

    def slow(fd, data, offset):
        gate.wait()
        return real(fd, data, offset)

    monkeypatch.setattr(segments.os, "pwrite", slow)
    # While the disk hangs, DRAM can still be put to and read from: no lock is held over a write.
    assert put(pool, range(4)) == [STORED] * 4
    assert put(pool, [5]) == [Status.TIMEOUT]
    assert get(pool, range(4)) == [HIT] * 4
    threading.Timer(0.05, gate.set).start()
    assert put(pool, [5]) == [STORED]
    assert get(pool, [*range(4), 5]) == [HIT] * 5
    assert pool.stats().put_wait_s > 0.3
    pool.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_writing_thread_leaves_a_pool_of_dram_and_what_is_on_disk(tmp_path, monkeypatch):
    pool = open_pool(tmp_path, put_timeout_s=5.0)
    put(pool, range(8))
    assert pool.flush()
    monkeypatch.setattr(Spiller, "_write", lambda self, header, views: 1 / 0)
    assert put(pool, [20], priority=1.0) == [STORED]
    assert put(pool, range(21, 60)) == [STORED] * 39
    assert get(pool, [*range(4), 20, 59]) == [HIT] * 6
    assert not pool.flush()
    assert pool.stats().num_timeouts == 0
    pool.close()


def test_a_flush_to_a_full_disk_loses_nothing_of_dram(tmp_path, monkeypatch):
    pool = open_pool(tmp_path, dram_blocks=8)

    def refuse(fd, data, offset):
        raise OSError(errno.ENOSPC, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "pwrite", refuse)
        put(pool, range(8))
        assert not pool.flush()
        assert get(pool, range(8)) == [HIT] * 8
    assert pool.flush()
    pool.close()


def test_blocks_worth_more_can_fill_more_than_half_of_the_disk(tmp_path):
    pool = open_pool(tmp_path, dram_blocks=1, max_disk_bytes=36 * RECORD)
    # They take turns with others, so that no file is ever mostly dead.
    for name in range(0, 44, 2):
        assert put(pool, [name], priority=1.0) == [STORED]
        put(pool, [name + 1])
    assert get(pool, range(0, 44, 2)) == [HIT] * 22
    assert pool.stats().disk_bytes <= 36 * RECORD
    pool.close()


def test_files_and_threads_are_given_back(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    num_threads = threading.active_count()
    for _ in range(3):
        pool = open_pool(tmp_path, dram_blocks=1, max_disk_bytes=16 * RECORD)
        put(pool, range(60))
        assert len(os.listdir("/proc/self/fd")) - before <= 16
        pool.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == num_threads


def test_a_killed_process_leaves_blocks_that_are_whole(tmp_path):
    script = f"""
import time
from tests.kvpool.blocks import put
from tests.kvpool.test_disk import open_pool
pool = open_pool({str(tmp_path)!r}, max_disk_bytes=4096 * {RECORD})
put(pool, range(3000))
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    wait_until(lambda: sum(file.stat().st_size for file in files_in(tmp_path)) > 12 * RECORD)
    child.kill()
    child.wait()
    pool = open_pool(tmp_path, max_disk_bytes=4096 * RECORD)
    num_recovered = pool.stats().num_recovered
    assert num_recovered >= 12
    assert get(pool, range(num_recovered)) == [HIT] * num_recovered
    assert pool.stats().truncated_bytes < RECORD
    pool.close()
