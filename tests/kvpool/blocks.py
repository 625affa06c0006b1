"""Blocks whose bytes follow from their name, so that a wrong byte is seen."""

import functools

import numpy as np

from seer_jax.kvpool import BlockKey, block_key, fingerprint

LAYOUT = fingerprint(model="tiny", page_size=4)


def make_key(name: int, epoch: int = 0) -> BlockKey:
    return block_key(None, np.array([name]), epoch=epoch, layout=LAYOUT)


@functools.cache
def make_block(name: int, num_bytes: int = 8192) -> np.ndarray:
    block = np.random.default_rng(name).integers(0, 256, (2, num_bytes // 2), np.uint8)
    block.flags.writeable = False
    return block


def put(pool, names, num_bytes: int = 8192, epoch: int = 0, priority: float = 0.0):
    keys = [make_key(name, epoch) for name in names]
    return pool.put_blocks(keys, [make_block(name, num_bytes) for name in names], priority=priority)


def get(pool, names, num_bytes: int = 8192, epoch: int = 0):
    """Statuses; a hit must have the right bytes."""
    outs = [np.zeros((2, num_bytes // 2), np.uint8) for _ in names]
    statuses = pool.get_blocks([make_key(name, epoch) for name in names], outs)
    for name, out, status in zip(names, outs, statuses, strict=True):
        assert status.value != "hit" or np.array_equal(out, make_block(name, num_bytes))
    return statuses
