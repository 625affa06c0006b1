"""Shapes at which paged latent attention is tested, compiled and measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import jax

from kernels_pallas._paged.arg_specs import TINY_WORKS, Work, call_args, float8_suffix


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a model and its cache fix."""

    heads: int
    """Of all devices together."""
    width: int
    row_width: int
    """Of the cache, padded for accelerators (`pad_row_width`)."""
    value_width: int
    qk_head_dim: int
    """The scale of scores is its inverse square root."""
    page_size: int
    dtype: str
    """Of the queries."""
    cache_dtypes: tuple[str, ...]
    tensor_parallel: tuple[int, ...]
    """Degrees over which the heads are divided; 1 = data-parallel attention."""
    num_pages: int
    """Of the pool, per layer."""


MODELS = {
    "tiny": Model(
        heads=4, width=80, row_width=128, value_width=64, qk_head_dim=48, page_size=16,
        dtype="float32", cache_dtypes=("float32",), tensor_parallel=(1,), num_pages=65,
    ),
    "moonlight": Model(
        heads=16, width=576, row_width=640, value_width=512, qk_head_dim=192, page_size=64,
        dtype="bfloat16", cache_dtypes=("bfloat16", "float8_e4m3fn"), tensor_parallel=(1, 2), num_pages=4096,
    ),
    "kimi_k2": Model(
        heads=64, width=576, row_width=640, value_width=512, qk_head_dim=192, page_size=64,
        dtype="bfloat16", cache_dtypes=("bfloat16", "float8_e4m3fn"), tensor_parallel=(1, 8, 16), num_pages=4096,
    ),
}  # fmt: skip
"""tiny is the preset `tiny_math`; 4096 pages of 64 rows are 0.34 GB a layer, 21 GB over K2's 61 layers, in
float8 half."""

WORKS = {
    "tiny": TINY_WORKS,
    "moonlight": {
        "decode": Work(tiles=256, tokens=1, context=8192),
        "tail": Work(tiles=4, tokens=1, context=65536),
        "verify": Work(tiles=64, tokens=8, context=8192, has_trees=True),
        "tail_verify": Work(tiles=4, tokens=33, context=65536, has_trees=True),
        "prefill": Work(tiles=64, tokens=16, context=8192),
    },
    "kimi_k2": {
        "decode": Work(tiles=64, tokens=1, context=131072),
        "tail": Work(tiles=4, tokens=1, context=131072),
        "verify": Work(tiles=64, tokens=8, context=131072, has_trees=True),
        "tail_verify": Work(tiles=4, tokens=33, context=131072, has_trees=True),
        "prefill": Work(tiles=64, tokens=16, context=131072),
    },
}
"""Tails are few long requests; 33 tokens are a newest token and the 32 draft tokens that a mask can name."""


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """Arguments of one call of `mla_attention`."""

    model: str
    work: str
    cache_dtype: str
    tensor_parallel: int
    args: tuple[jax.ShapeDtypeStruct | None, ...]
    """q, cache, block_tables, limits, tree_start, tree_mask."""
    value_width: int
    scale: float

    @property
    def name(self) -> str:
        """Unique among all, such as `kimi_k2-verify-tp8`."""
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
        query, cache = (of.heads // degree, of.width), (of.num_pages, of.page_size, of.row_width)
        yield ArgSpec(
            model=model,
            work=name,
            cache_dtype=cache_dtype,
            tensor_parallel=degree,
            args=call_args(work, query, cache, of.dtype, cache_dtype),
            value_width=of.value_width,
            scale=of.qk_head_dim**-0.5,
        )
