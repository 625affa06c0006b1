"""Shapes at which paged grouped-query attention is tested, compiled and measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import jax

from kernels_pallas._paged.arg_specs import TINY_WORKS, Work, call_args, float8_suffix


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a model and its cache fix; heads are those of all devices together."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    """Of the queries."""
    cache_dtypes: tuple[str, ...]
    tensor_parallel: tuple[int, ...]
    """Degrees over which the KV heads are divided."""
    num_pages: int
    """Of the pool, per layer."""


MODELS = {
    "tiny": Model(
        heads=4, kv_heads=2, head_dim=64, page_size=16, dtype="float32", cache_dtypes=("float32",),
        tensor_parallel=(1,), num_pages=65,
    ),
    "qwen2_72b": Model(
        heads=64, kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16",
        cache_dtypes=("bfloat16", "float8_e4m3fn"), tensor_parallel=(1, 2, 4, 8), num_pages=4096,
    ),
}  # fmt: skip
"""4096 pages of 64 rows are 1.07 GB a layer, 86 GB over Qwen2-72B's 80 layers."""

WORKS = {
    "tiny": TINY_WORKS,
    "qwen2_72b": {
        "decode": Work(tiles=128, tokens=1, context=8192),
        "tail": Work(tiles=4, tokens=1, context=32768),
        "verify": Work(tiles=64, tokens=8, context=8192, has_trees=True),
        "tail_verify": Work(tiles=4, tokens=33, context=32768, has_trees=True),
        "prefill": Work(tiles=64, tokens=16, context=8192),
    },
}
"""Tails are few long requests; 33 tokens are a newest token and the 32 draft tokens that a mask can name."""


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """Arguments of one call of `gqa_attention`, on one of its devices."""

    model: str
    work: str
    cache_dtype: str
    tensor_parallel: int
    args: tuple[jax.ShapeDtypeStruct | None, ...]
    """q, cache, block_tables, limits, tree_start, tree_mask."""
    scale: float

    @property
    def name(self) -> str:
        """Unique among all, such as `qwen2_72b-verify-tp8`."""
        return f"{self.model}-{self.work}-tp{self.tensor_parallel}{float8_suffix(self.cache_dtype)}"


def arg_specs(model: str) -> Iterator[ArgSpec]:
    """List the calls of a model.

    Args:
        model: A key of `MODELS`.

    Yields:
        One for every work, tensor-parallel degree and type of the cache.

    Raises:
        KeyError: If there is no such model.
    """
    of = MODELS[model]
    for (name, work), degree, cache_dtype in product(WORKS[model].items(), of.tensor_parallel, of.cache_dtypes):
        query = (of.heads // degree, of.head_dim)
        cache = (of.num_pages, of.page_size, of.kv_heads // degree * 2 * of.head_dim)
        yield ArgSpec(
            model=model,
            work=name,
            cache_dtype=cache_dtype,
            tensor_parallel=degree,
            args=call_args(work, query, cache, of.dtype, cache_dtype),
            scale=of.head_dim**-0.5,
        )
