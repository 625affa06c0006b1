"""The cache of grouped-query models: one row per token, [pages, S, Hkv x 2 x D], key and value of each KV head in turn.

Why this one:
- **A token is one row**, so that `kv_update` and `kv_move` write it as they write a latent, and the engine copies,
  moves and offloads pages of both kinds of model alike.
- **A page is one piece of memory**: a single DMA brings keys and values of all heads, 256 KB for 64 rows of
  Qwen2-72B and still 32 KB where 8 devices hold one KV head each. Keys and values in arrays apart would be twice as
  many DMAs of half the size; [pages, Hkv, S, 2 x D] is as contiguous, but a token is Hkv rows in it, each in a
  register tile of its own that a write must read and write back.
- **A KV head's columns are neighbours**, so that tensor parallelism over KV heads is an even split of the last axis,
  and each device's part of a page is again one piece.
- **With D = 128 a key and a value are a register wide**, so that the TPU kernel cuts them out without moving lanes, and
  nothing is padded. With D = 64 both share a register: queries are padded with zeros instead.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas._paged.layout import LANES, why_not_gpu, why_not_pages

MAX_GPU_HEAD_DIM = 256
"""Of which queries and two buffers of keys and values are 160 KB of a thread block's shared memory."""


def join_kv(keys: Float[Array, "T G D"], values: Float[Array, "T G D"]) -> Float[Array, "T Wc"]:
    """Lay out the cache rows of tokens.

    Args:
        keys: Of each token and KV head.
        values: Likewise.

    Returns:
        Rows for `kv_update`, Wc = 2 x G x D.
    """
    return jnp.concatenate([keys, values], axis=2).reshape(len(keys), -1)


def count_kv_heads(q, cache) -> int:
    """Count the KV heads of a cache.

    Args:
        q: Queries [N, Tq, H, D], or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.

    Returns:
        Wc / 2 D.

    Raises:
        ValueError: If a row is not whole heads, or the query heads are no multiple of theirs.
    """
    heads, head_dim, row_width = *q.shape[2:], cache.shape[2]
    kv_heads = row_width // (2 * head_dim)
    if not kv_heads or row_width % (2 * head_dim):
        raise ValueError(f"gqa_attention: rows of {row_width} are not keys and values of heads of {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"gqa_attention: {heads} query heads cannot share {kv_heads} KV heads evenly")
    return kv_heads


def why_not_pallas_tpu(q, cache) -> str | None:
    """Say why the TPU kernel cannot serve these shapes, or None if it can.

    Args:
        q: Queries [N, Tq, H, D], or their ShapeDtypeStruct.
        cache: Pages [pages, S, Wc], or their ShapeDtypeStruct.

    Returns:
        The reason in a few words.
    """
    if 2 * q.shape[3] % LANES:
        return f"a KV head's key and value are {2 * q.shape[3]} wide, no multiple of {LANES}"
    return why_not_pages(q, cache)


def why_not_pallas_gpu(q, cache) -> str | None:
    """Say why the GPU kernel cannot serve these shapes, or None if it can; arguments as in `why_not_pallas_tpu`."""
    if q.shape[3] > MAX_GPU_HEAD_DIM:
        return f"heads are {q.shape[3]} wide, more than {MAX_GPU_HEAD_DIM}"
    return why_not_gpu(q, cache, q.shape[3])
