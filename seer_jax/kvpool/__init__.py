"""The global KV pool: KV of paused and evicted requests, for whichever instance goes on with them."""

from seer_jax.kvpool.embedded import EmbeddedKVPool
from seer_jax.kvpool.keys import BlockKey, block_key, chain_keys, fingerprint
from seer_jax.kvpool.mooncake import MooncakeKVPool
from seer_jax.kvpool.pool import KVPool, PoolStats, Status

__all__ = [
    "BlockKey",
    "EmbeddedKVPool",
    "KVPool",
    "MooncakeKVPool",
    "PoolStats",
    "Status",
    "block_key",
    "chain_keys",
    "fingerprint",
]
