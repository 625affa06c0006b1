"""Blocks that several nodes' owners hold: found wherever they are, and a miss when their owner is gone."""

import dataclasses
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import ray

from seer_jax.config.schema import KVPoolConfig, RolloutConfig, RunConfig
from seer_jax.distributed import pool_owners
from seer_jax.distributed.kv_pool import MAX_CONCURRENCY, PoolDirectory, PoolOwner, RayKVPool
from seer_jax.distributed.pool_owners import PoolOwners
from seer_jax.distributed.ray_cluster import start_ray
from seer_jax.kvpool import EmbeddedKVPool, Status
from tests.kvpool.blocks import get, make_block, make_key, put

pytestmark = pytest.mark.ray
HIT, MISS, STORED, TIMEOUT = Status.HIT, Status.MISS, Status.STORED, Status.TIMEOUT


@pytest.fixture(scope="module", autouse=True)
def _ray():
    start_ray()
    yield
    ray.shutdown()


def start_owner(kind=PoolOwner):
    owner = ray.remote(kind).options(num_cpus=0, max_concurrency=MAX_CONCURRENCY)
    return owner.remote(partial(EmbeddedKVPool, 1 << 20))


@pytest.fixture
def nodes():
    """Owners of two nodes, their directory, and an instance on each."""
    owners = {"a": start_owner(), "b": start_owner()}
    directory = ray.remote(PoolDirectory).options(num_cpus=0, max_concurrency=2).remote()
    pools = {node: RayKVPool(node) for node in owners}
    for pool in pools.values():
        pool.connect(owners, directory)
    yield owners, directory, pools
    for actor in (*owners.values(), directory):
        ray.kill(actor)


def test_an_instance_gets_what_another_node_has_and_anyone_drops_it(nodes):
    owners, _, pools = nodes
    assert put(pools["a"], range(4)) == [STORED] * 4 and put(pools["b"], range(4, 6)) == [STORED] * 2
    assert get(pools["b"], range(7)) == [HIT] * 6 + [MISS]
    assert pools["a"].contains([make_key(name) for name in (0, 5, 6)]) == [True, True, False]
    assert ray.get(owners["a"].stats.remote()).num_blocks == 4
    pools["b"].drop([make_key(0), make_key(4)])
    assert get(pools["a"], range(6)) == [MISS, HIT, HIT, HIT, MISS, HIT]
    put(pools["a"], [9], epoch=1)
    assert pools["b"].drop_epochs_before(1) == 4
    assert get(pools["b"], [1, 5]) == [MISS] * 2 and get(pools["b"], [9], epoch=1) == [HIT]


def test_a_dead_owner_is_a_miss_and_another_takes_its_place(nodes):
    owners, directory, pools = nodes
    put(pools["a"], range(4))
    put(pools["b"], range(4, 8))
    ray.kill(owners["a"])
    assert get(pools["b"], range(8)) == [MISS] * 4 + [HIT] * 4
    assert get(pools["a"], range(8)) == [MISS] * 4 + [HIT] * 4
    assert put(pools["a"], [0]) == [TIMEOUT]
    assert pools["a"].contains([make_key(0), make_key(4)]) == [False, True]
    assert pools["a"].stats().num_blocks == 4
    owners["a"] = start_owner()
    pools["a"].connect(owners, directory)
    assert put(pools["a"], [0]) == [STORED] and get(pools["a"], [0, 4]) == [HIT] * 2


def test_a_new_directory_is_told_what_the_owners_hold(nodes):
    owners, directory, pools = nodes
    put(pools["a"], range(4))
    ray.kill(directory)
    assert get(pools["b"], [0]) == [MISS] and get(pools["a"], [0]) == [HIT]
    directory = ray.remote(PoolDirectory).options(num_cpus=0, max_concurrency=2).remote()
    ray.get([owner.announce.remote(node, directory) for node, owner in owners.items()])
    pools["b"].connect(owners, directory)
    deadline = time.monotonic() + 20
    while get(pools["b"], [0]) == [MISS] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert get(pools["b"], range(4)) == [HIT] * 4
    ray.kill(directory)


class HangingOwner(PoolOwner):
    """Does not answer."""

    def get_blocks(self, keys, types):
        """Hang."""
        threading.Event().wait()


def test_a_silent_owner_costs_one_deadline():
    owner = start_owner(HangingOwner)
    ray.get(owner.stats.remote())
    pool = RayKVPool("a", timeout_s=0.5)
    pool.connect({"a": owner}, None)
    assert put(pool, [0]) == [STORED]
    started = time.monotonic()
    assert get(pool, [0]) == get(pool, [0]) == put(pool, [1]) == [TIMEOUT]
    assert 0.5 <= time.monotonic() - started < 0.9
    ray.kill(owner)


def test_more_than_fits_a_call_goes_in_several(nodes, monkeypatch):
    monkeypatch.setattr("seer_jax.distributed.kv_pool.BATCH_BYTES", 20_000)
    pool = nodes[2]["a"]
    assert put(pool, range(7)) == [STORED] * 7 and get(pool, range(8)) == [HIT] * 7 + [MISS]
    large = np.concatenate([make_block(0)] * 10)
    assert pool.put_blocks([make_key(20)], [large]) == [STORED]
    assert pool.put_blocks([], []) == pool.get_blocks([], []) == []


def test_an_owner_that_hangs_is_killed_and_another_takes_its_place(monkeypatch):
    monkeypatch.setattr(pool_owners, "PING_INTERVAL_S", 0.1)
    config = RunConfig(kvpool=KVPoolConfig(backend="ray"), rollout=RolloutConfig(instance_timeout_s=2.0))
    owners = PoolOwners(dataclasses.replace(config, kvpool=dataclasses.replace(config.kvpool, dram_mib=1)))
    ((node, owner),) = owners.actors.items()
    owners.kill_silent()
    os.kill(ray.get(owner.__ray_call__.remote(lambda _: os.getpid())), signal.SIGSTOP)
    ended: list = []
    while not ended:
        owners.kill_silent()
        ended, _ = ray.wait(list(owners.watches), timeout=0.1)
    owners.replace(ended[0])
    assert owners.actors[node] is not owner and owners.stats().num_owners_lost == 1
    owners.kill()
    owners.replace(next(iter(owners.watches)))
    owners.close()
    owners.kill()  # Nobody is left: nothing happens.


def test_a_call_waits_once_however_many_owners_are_silent():
    class Silent(PoolOwner):
        def get_blocks(self, keys, types):
            time.sleep(60)

    names = [f"n{i}" for i in range(4)]
    owners = {name: start_owner(Silent) for name in names}
    directory = ray.remote(PoolDirectory).options(num_cpus=0, max_concurrency=2).remote()
    ray.get([directory.add.remote(name, [make_key(0)]) for name in names])
    pool = RayKVPool("here", timeout_s=1.0)
    pool.connect(owners, directory)
    started = time.monotonic()
    assert get(pool, [0]) == [TIMEOUT]
    assert time.monotonic() - started < 2.5, "one deadline, not four"
    for actor in (*owners.values(), directory):
        ray.kill(actor)
