"""The Mooncake backend against a real master: what the contract of all pools does not say."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.kvpool import MooncakeKVPool, Status
from seer_jax.kvpool.blocks import HEADER_BYTES
from seer_jax.kvpool.mooncake_client import MIN_SEGMENT_BYTES, connect, epoch_name, less_than
from tests.kvpool.blocks import get, make_key, put
from tests.kvpool.mooncake_master import Master, free_ports, needs_mooncake, shared_master

HIT, MISS, STORED, CORRUPT = Status.HIT, Status.MISS, Status.STORED, Status.CORRUPT
NO_SPACE, TIMEOUT = Status.NO_SPACE, Status.TIMEOUT


def open_pool(master=None, namespace="test", segment_bytes=MIN_SEGMENT_BYTES, timeout_s=5.0, **options):
    address = (master or shared_master()).address
    return MooncakeKVPool(address, namespace=namespace, segment_bytes=segment_bytes, timeout_s=timeout_s, **options)


@needs_mooncake
def test_what_it_evicts_is_a_miss_and_nothing_comes_out_wrong():
    pool = open_pool(buffer_bytes=2 << 20)
    num_bytes, num_fit = 256 << 10, MIN_SEGMENT_BYTES // (256 << 10)
    put_statuses = put(pool, range(4 * num_fit), num_bytes)
    assert set(put_statuses) <= {STORED, NO_SPACE}
    assert put_statuses.count(STORED) > num_fit
    get_statuses = get(pool, range(4 * num_fit), num_bytes)
    assert set(get_statuses) == {HIT, MISS}
    assert get_statuses.count(HIT) < num_fit
    pool.close()


@needs_mooncake
@pytest.mark.parametrize("fault", ["killed", "hanging"])
def test_a_master_that_does_not_answer_costs_one_deadline_and_is_found_again(fault):
    master = Master()
    pool = open_pool(master, timeout_s=0.5)
    assert put(pool, range(3)) == [STORED] * 3
    if fault == "killed":
        master.kill()
    else:
        os.kill(master.process.pid, signal.SIGSTOP)

    started = time.monotonic()
    assert get(pool, range(3)) == [TIMEOUT] * 3
    assert time.monotonic() - started < 1.0
    started = time.monotonic()
    # Long enough for probes, which fail.
    while time.monotonic() - started < 2.0:
        called = time.monotonic()
        assert get(pool, range(3)) == [MISS] * 3
        assert put(pool, [7]) == [NO_SPACE]
        assert pool.contains([make_key(1)]) == [False]
        assert pool.drop_epochs_before(1) == 0
        pool.drop([make_key(1)])
        assert time.monotonic() - called < 0.2
        time.sleep(0.05)
    stats = pool.stats()
    assert stats.num_timeouts == 3
    assert stats.num_unasked >= 4 * 10
    assert stats.num_refused == stats.num_unasked // 4

    if fault == "killed":
        master.start()
    else:
        os.kill(master.process.pid, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while put(pool, [7]) != [STORED]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert get(pool, [7]) == [HIT]
    pool.close()
    master.kill()


@needs_mooncake
def test_a_pool_whose_master_is_dead_closes_in_time():
    master = Master()
    pool = open_pool(master, timeout_s=0.5)
    os.kill(master.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 2.0
    assert get(pool, [1]) == [MISS]
    master.kill()


@needs_mooncake
@pytest.mark.parametrize("change", ["cut", "longer", "header", "other block", "nothing of ours"])
def test_bytes_that_are_not_the_block_are_corrupt_and_thrown_out(change):
    pool = open_pool()
    raw = connect(shared_master().address, segment_bytes=0, timeout_s=5.0)
    put(pool, range(4))
    name, other = (pool._name(make_key(index)) for index in (2, 3))
    local = np.zeros(HEADER_BYTES + 8192, np.uint8)
    assert raw.get_into(other if change == "other block" else name, local.ctypes.data, len(local)) == len(local)
    changed = bytearray(local.tobytes())
    if change == "header":
        changed[70] ^= 1
    lengths = {"cut": 8000, "nothing of ours": 10, "longer": len(changed)}
    changed = changed[: lengths.get(change)] + bytes(100) * (change == "longer")
    damaged = np.frombuffer(bytes(changed), np.uint8)
    assert raw.upsert_from(name, damaged.ctypes.data, len(damaged)) == 0
    assert get(pool, range(4)) == [HIT, HIT, CORRUPT, HIT]
    # What is longer may be the block of a longer array, so it stays.
    assert get(pool, [2]) == [CORRUPT if change == "longer" else MISS]
    pool.drop([make_key(2)])
    assert put(pool, [2]) == [STORED]
    assert get(pool, [2]) == [HIT]
    raw.close()
    pool.close()


CHILD = """
import sys
from tests.kvpool.blocks import get, put
from seer_jax.kvpool import MooncakeKVPool
pool = MooncakeKVPool(sys.argv[1], namespace="both", segment_bytes=16 << 20)
print({status.value for status in put(pool, range(10, 50))}, flush=True)
sys.stdin.readline()
print({status.value for status in get(pool, range(3))}, flush=True)
sys.stdin.readline()
"""


@needs_mooncake
def test_two_processes_see_each_others_blocks_and_outlive_each_other():
    master = Master("--client_ttl=2")
    pool = open_pool(master, namespace="both", timeout_s=2.0)
    put(pool, range(3))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, master.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "{'stored'}\n"
    assert get(pool, range(10, 50)) == [HIT] * 40
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "{'hit'}\n"
    child.kill()
    child.wait()
    started = time.monotonic()
    # Blocks go to the segments at random, so some were in the child's.
    assert {HIT} != set(get(pool, range(10, 50))) <= {HIT, MISS, TIMEOUT}
    assert time.monotonic() - started < 3.0
    deadline = time.monotonic() + 60
    while put(pool, [60]) != [STORED]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert get(pool, [60]) == [HIT]
    pool.close()
    master.kill()


@needs_mooncake
def test_runs_with_names_of_their_own_share_a_master_and_nothing_else():
    pools = [open_pool(namespace=name) for name in ("run", "run-2")]
    put(pools[0], range(3))
    assert get(pools[1], range(3)) == [MISS] * 3
    assert pools[1].drop_epochs_before(5) == 0
    assert get(pools[0], range(3)) == [HIT] * 3
    for pool in pools:
        pool.close()


@needs_mooncake
def test_epochs_are_told_apart_by_value_not_by_their_digits():
    pool = open_pool()
    epochs = (0, 2, 9, 10, 11, 99, 100, 101, 1000)
    for epoch in epochs:
        put(pool, [1], epoch=epoch)
    for oldest, num_dropped in ((0, 0), (10, 3), (100, 3), (1001, 3)):
        assert pool.drop_epochs_before(oldest) == num_dropped
        assert [get(pool, [1], epoch=epoch) == [HIT] for epoch in epochs] == [epoch >= oldest for epoch in epochs]
    pool.close()


@needs_mooncake
def test_without_a_master_it_says_so_at_once():
    (port,) = free_ports(1)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"no mooncake_master at 127.0.0.1:{port}.*start_mooncake"):
        MooncakeKVPool(f"127.0.0.1:{port}", namespace="test", segment_bytes=0)
    with pytest.raises(ConfigError, match="host:port"):
        MooncakeKVPool("localhost", namespace="test", segment_bytes=0)
    assert time.monotonic() - started < 2.0


def test_without_the_package_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match=r"pip install 'seer_jax\[mooncake\]'"):
        MooncakeKVPool("127.0.0.1:50051", namespace="test", segment_bytes=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"namespace": ""},
        {"namespace": "a/b"},
        {"namespace": "a.*"},
        {"segment_bytes": -1},
        {"segment_bytes": MIN_SEGMENT_BYTES - 1},
        {"buffer_bytes": HEADER_BYTES},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        MooncakeKVPool("127.0.0.1:50051", **{"namespace": "test", "segment_bytes": 0} | wrong)


def test_the_pattern_of_older_epochs_matches_these_and_no_others():
    for epoch in (1, 7, 10, 19, 20, 100, 101, 4096, 10**12 + 1):
        pattern = re.compile(less_than(epoch))
        around = {*range(max(0, epoch - 120), epoch + 120), 0, 5, 10 * epoch, epoch // 10, 10**19}
        assert all((pattern.fullmatch(epoch_name(other)) is not None) == (other < epoch) for other in around)
