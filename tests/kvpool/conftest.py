"""Pools that need processes of their own."""

from functools import partial

import pytest
import ray

from seer_jax.distributed.kv_pool import MAX_CONCURRENCY, PoolDirectory, PoolOwner, RayKVPool
from seer_jax.distributed.ray_cluster import start_ray
from seer_jax.kvpool import EmbeddedKVPool


@pytest.fixture(scope="module")
def ray_running():
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def owners(ray_running):
    """Owners of two nodes and their directory, which are actors."""
    owner = ray.remote(PoolOwner).options(num_cpus=0, max_concurrency=MAX_CONCURRENCY)
    actors = {node: owner.remote(partial(EmbeddedKVPool, 16 * 8192)) for node in ("here", "there")}
    directory = ray.remote(PoolDirectory).options(num_cpus=0, max_concurrency=2).remote()
    yield actors, directory
    for actor in (*actors.values(), directory):
        ray.kill(actor)


@pytest.fixture
def ray_pool(owners):
    pool = RayKVPool("here")
    pool.connect(*owners)
    return pool
