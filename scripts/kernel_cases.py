"""Calls at which `bench_kernels.py` times the kernels, and the work that each needs.

Operations and bytes are what the definition needs: weights of the experts in use, rows up to each position, queries
and results, once each; no padding, nothing that an implementation does beyond, no tables and limits, which are small.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas._dispatch import PREFERRED
from kernels_pallas._paged.layout import FLOAT8
from kernels_pallas.gqa_attention.api import IMPLEMENTATIONS as GQA_ATTENTION
from kernels_pallas.gqa_attention.arg_specs import MODELS as GQA_MODELS
from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS as GROUPED_MLP
from kernels_pallas.grouped_matmul.arg_specs import MODELS as EXPERT_MODELS
from kernels_pallas.grouped_matmul.blocks import num_blocks
from kernels_pallas.kv_update.api import IMPLEMENTATIONS as KV_UPDATE
from kernels_pallas.mla_attention import pad_row_width
from kernels_pallas.mla_attention.api import IMPLEMENTATIONS as MLA_ATTENTION
from kernels_pallas.mla_attention.arg_specs import MODELS as MLA_MODELS
from kernels_pallas.tree_verify import tree_verify
from kernels_pallas.tree_verify.api import IMPLEMENTATIONS as TREE_VERIFY
from kernels_pallas.tree_verify.arg_specs import ArgSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: Name.
        shape: The shape in words.
        implementations: Name -> function; the last is what the others are compared with.
        call: `(function, *arrays) -> result`.
        feed: `(first, result) -> first`: mixes a little of a result into the next call, so that none can be elided.
        make_arrays: Makes first and the others on the device.
        flops: Operations that the definition needs.
        num_bytes: Bytes that it must read and write.
    """

    operation: str
    shape: str
    implementations: dict[str, Callable]
    call: Callable[..., jax.Array]
    feed: Callable[[jax.Array, jax.Array], jax.Array]
    make_arrays: Callable[[], tuple[jax.Array | None, ...]]
    flops: int
    num_bytes: int


def list_cases(platform: str) -> Iterator[Case]:
    """List the cases of a platform, smallest first of each operation.

    Args:
        platform: As `jax.default_backend()` names it: on "cpu" small float32 calls, elsewhere Moonlight's, Kimi-K2's
            and Qwen2-72B's in bfloat16.
    """
    yield from _cpu_cases() if platform == "cpu" else _accelerator_cases(platform)


def _cpu_cases() -> Iterator[Case]:
    """Decode and prefill of a 4-layer, 256-wide model, training of tiny_math's, draws of vocabularies."""
    of = functools.partial(mla_case, "cpu", heads=4, width=80, value_width=64, page=16, dtype="float32")
    for tiles, tokens, context in ((1, 1, 256), (16, 1, 256), (16, 1, 1024), (16, 16, 256), (16, 1, 8192)):
        yield of(tiles, tokens, context)
    yield of(16, 1, 1024, is_mixed=True)
    yield of(16, 1, 1024, cache_dtype=FLOAT8.name)
    of = functools.partial(gqa_case, "cpu", heads=8, kv_heads=2, head_dim=64, page=16, dtype="float32")
    for tiles, tokens, context in ((1, 1, 256), (16, 1, 1024), (16, 16, 256)):
        yield of(tiles, tokens, context)
    yield of(16, 1, 1024, is_mixed=True)
    for tokens in (1, 4, 16, 32, 256):
        yield grouped_mlp_case("cpu", tokens, 8, 2, 256, 128, dtype="float32")
    yield grouped_mlp_case("cpu", 4096, 8, 2, 128, 96, dtype="float32", has_gradient=True)
    for tokens in (16, 272):
        yield kv_update_case("cpu", tokens, 80, page=16, dtype="float32")
    for rows, width, vocab in ((16, 128, 264), (64, 128, 264), (1, 2048, 163_840), (4, 2048, 163_840)):
        yield tree_verify_case("cpu", ArgSpec(rows=rows, width=width, vocab=vocab, dtype="float32"))


def _accelerator_cases(platform: str) -> Iterator[Case]:
    """Decode at two batches, 7 drafts of 64 requests, 16 slices of prompts, experts and draws of as many tokens."""
    for model in ("moonlight", "kimi_k2"):
        of = MLA_MODELS[model]
        case = functools.partial(
            mla_case, platform, heads=of.heads, width=of.width, value_width=of.value_width, page=of.page_size
        )
        for tiles, context in ((64, 8192), (4, 65536)):
            for cache_dtype in of.cache_dtypes:
                yield case(tiles, 1, context, cache_dtype=cache_dtype)
        yield case(64, 8, 8192)
        yield case(16, 16, 8192)
    of = GQA_MODELS["qwen2_72b"]
    for degree, tiles, context in ((8, 64, 8192), (1, 64, 8192), (1, 4, 32768)):
        for cache_dtype in of.cache_dtypes:
            heads, kv_heads = of.heads // degree, of.kv_heads // degree
            yield gqa_case(
                platform, tiles, 1, context, heads=heads, kv_heads=kv_heads, head_dim=of.head_dim, page=of.page_size,
                cache_dtype=cache_dtype,
            )  # fmt: skip
    for tiles, tokens in ((64, 8), (16, 16)):
        heads, kv_heads = of.heads // 8, of.kv_heads // 8
        yield gqa_case(
            platform, tiles, tokens, 8192, heads=heads, kv_heads=kv_heads, head_dim=of.head_dim, page=of.page_size
        )
    for model, degree in (("moonlight", 1), ("kimi_k2", 16)):
        of = EXPERT_MODELS[model]
        for tokens in (4, 32, 64, 256):
            for is_quantised in of.quantised:
                yield grouped_mlp_case(
                    platform, tokens, of.experts, of.experts_per_token, of.width, of.expert_width, degree=degree,
                    is_quantised=is_quantised,
                )  # fmt: skip
    for dtype in ("bfloat16", FLOAT8.name):
        yield kv_update_case(platform, 64, 576, page=64, dtype="bfloat16", cache_dtype=dtype)
    for width in (2048, 7168):
        for rows in (64, 256):
            yield tree_verify_case(platform, ArgSpec(rows=rows, width=width, vocab=163_840))


def mla_case(
    platform: str, tiles: int, tokens: int, context: int, *, heads: int, width: int, value_width: int, page: int,
    dtype: str = "bfloat16", cache_dtype: str | None = None, is_mixed: bool = False,
) -> Case:  # fmt: skip
    """Latent attention of `tokens` query tokens of each of `tiles` requests, at their contexts' ends."""
    cache_dtype = cache_dtype or dtype
    tables, limits, seen, read = _paged_contexts(tiles, tokens, context, page, is_mixed)
    queries = (tiles, tokens, heads, width)

    def make_arrays() -> tuple[jax.Array | None, ...]:
        cache = (tables.size + 1, page, pad_row_width(width, platform))
        return _normal(0, queries, dtype), _normal(1, cache, cache_dtype), tables, limits, None, None

    return Case(
        operation="mla_attention",
        shape=f"N={tiles} Tq={tokens} H={heads} W={width} {_context_words(context, is_mixed)} {cache_dtype}",
        implementations=_those_that_count(platform, MLA_ATTENTION),
        call=lambda function, *arrays: function(*arrays, value_width=value_width, scale=width**-0.5),
        feed=lambda q, out: q.at[..., :value_width].add((1e-3 * out).astype(q.dtype)),
        make_arrays=make_arrays,
        flops=2 * seen * heads * (width + value_width),
        num_bytes=read * width * _size(cache_dtype) + tiles * tokens * heads * (width + value_width) * _size(dtype),
    )


def gqa_case(
    platform: str, tiles: int, tokens: int, context: int, *, heads: int, kv_heads: int, head_dim: int, page: int,
    dtype: str = "bfloat16", cache_dtype: str | None = None, is_mixed: bool = False,
) -> Case:  # fmt: skip
    """The same with `kv_heads` keys and values a row."""
    cache_dtype = cache_dtype or dtype
    tables, limits, seen, read = _paged_contexts(tiles, tokens, context, page, is_mixed)
    queries, row = (tiles, tokens, heads, head_dim), 2 * kv_heads * head_dim

    def make_arrays() -> tuple[jax.Array | None, ...]:
        cache = (tables.size + 1, page, row)
        return _normal(0, queries, dtype), _normal(1, cache, cache_dtype), tables, limits, None, None

    words = _context_words(context, is_mixed)
    return Case(
        operation="gqa_attention",
        shape=f"N={tiles} Tq={tokens} H={heads}/{kv_heads} D={head_dim} {words} {cache_dtype}",
        implementations=_those_that_count(platform, GQA_ATTENTION),
        call=lambda function, *arrays: function(*arrays, scale=head_dim**-0.5),
        feed=lambda q, out: q + (1e-3 * out).astype(q.dtype),
        make_arrays=make_arrays,
        flops=2 * seen * heads * 2 * head_dim,
        num_bytes=read * row * _size(cache_dtype) + 2 * tiles * tokens * heads * head_dim * _size(dtype),
    )


def grouped_mlp_case(
    platform: str, tokens: int, experts: int, chosen: int, model: int, ffn: int, *, degree: int = 1,
    dtype: str = "bfloat16", is_quantised: bool = False, has_gradient: bool = False,
) -> Case:  # fmt: skip
    """Tokens with random experts, of which one of `degree` devices has its share; with the backward pass, or not."""
    ids = np.argsort(np.random.default_rng(0).random((tokens, experts)), axis=1)[:, :chosen]
    here = experts // degree
    ids = np.where(ids < here, ids, here).astype(np.int32)
    active, assigned, passes = len(np.setdiff1d(ids, here)), int((ids < here).sum()), 3 if has_gradient else 1
    matrices = (here, model, 2 * ffn), (here, ffn, model)
    of_expert = sum(_matrix_bytes(shape[1:], dtype, is_quantised) for shape in matrices)

    def make_arrays() -> tuple[jax.Array | None, ...]:
        # Values of any size do: what a product takes does not depend on them.
        weights = [_normal(i, s, FLOAT8.name if is_quantised else dtype) for i, s in enumerate(matrices, start=1)]
        scales = [jnp.full((here, *map(num_blocks, s[1:])), s[1] ** -0.5) for s in matrices] if is_quantised else ()
        if not is_quantised:
            weights = [w * jnp.asarray(w.shape[1] ** -0.5, dtype) for w in weights]
        x = _normal(0, (tokens, model), dtype)
        return x, jnp.asarray(ids), jnp.full((tokens, chosen), 1 / chosen), *weights, *scales

    words = f" of {experts}" if degree > 1 else ""
    return Case(
        operation="grouped_mlp",
        shape=f"T={tokens} M={model} E={here}{words} K={chosen} F={ffn} "
        + (FLOAT8.name if is_quantised else dtype)
        + (" with gradient" if has_gradient else ""),
        implementations=_those_that_count(platform, GROUPED_MLP),
        call=_gradient if has_gradient else lambda function, *arrays: function(*arrays),
        feed=lambda x, out: x + ((1e-9 if has_gradient else 1e-3) * out).astype(x.dtype),
        make_arrays=make_arrays,
        flops=passes * 2 * assigned * 3 * model * ffn,
        num_bytes=passes * active * of_expert + 2 * tokens * model * _size(dtype),
    )


def _gradient(function: Callable, x: jax.Array, ids: jax.Array, *rest: jax.Array) -> jax.Array:
    def loss(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(function(x, ids, *rest)))

    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(x, *rest)
    return grads[0] + 1e-6 * sum(jnp.sum(grad) for grad in grads[1:])


def kv_update_case(
    platform: str, tokens: int, width: int, *, page: int, dtype: str, cache_dtype: str | None = None
) -> Case:
    """Rows into 1024 pages."""
    cache_dtype = cache_dtype or dtype
    slots = np.random.default_rng(0).permutation(1024 * page)[:tokens].astype(np.int32)

    def make_arrays() -> tuple[jax.Array, ...]:
        cache = _normal(0, (1024, page, pad_row_width(width, platform)), cache_dtype)
        return cache, _normal(1, (tokens, cache.shape[2]), dtype), jnp.asarray(slots)

    return Case(
        operation="kv_update",
        shape=f"T={tokens} W={width} {cache_dtype}",
        implementations=_those_that_count(platform, KV_UPDATE),
        call=lambda function, *arrays: function(*arrays),
        feed=lambda _, cache: cache,
        make_arrays=make_arrays,
        flops=0,
        num_bytes=tokens * width * (_size(dtype) + _size(cache_dtype)),
    )


def tree_verify_case(platform: str, spec: ArgSpec) -> Case:
    """Draws at temperature 1."""

    def make_arrays() -> tuple[jax.Array, ...]:
        head = _normal(1, (spec.width, spec.vocab), spec.dtype) * jnp.asarray(spec.width**-0.5, spec.dtype)
        keys = np.random.default_rng(0).integers(0, 2**32, (spec.rows, 2), dtype=np.uint32)
        positions = jnp.arange(spec.rows, dtype=jnp.int32)
        return _normal(0, (spec.rows, spec.width), spec.dtype), head, jnp.asarray(keys), positions, jnp.ones(spec.rows)

    names = _those_that_count(platform, TREE_VERIFY)
    return Case(
        operation="tree_verify",
        shape=f"E={spec.rows} M={spec.width} V={spec.vocab} {spec.dtype}",
        implementations={name: functools.partial(tree_verify, implementation=name) for name in names},
        call=lambda function, *arrays: function(*arrays).logprobs,
        feed=lambda hidden, logprobs: hidden + (1e-6 * logprobs[:, None]).astype(hidden.dtype),
        make_arrays=make_arrays,
        flops=spec.flops,
        num_bytes=spec.num_bytes,
    )


def _paged_contexts(
    tiles: int, tokens: int, context: int, page: int, is_mixed: bool
) -> tuple[jax.Array, jax.Array, int, int]:
    """Block tables, limits, (query, row) pairs that the queries see, and rows that the tiles must read."""
    rng = np.random.default_rng(0)
    length = rng.integers(tokens, context, tiles) + 1 if is_mixed else np.full(tiles, context)
    tables = 1 + rng.permutation(tiles * context // page).reshape(tiles, -1).astype(np.int32)
    limits = (length - tokens)[:, None] + np.arange(1, tokens + 1)
    return jnp.asarray(tables), jnp.asarray(limits, jnp.int32), int(limits.sum()), int(length.sum())


def _context_words(context: int, is_mixed: bool) -> str:
    return f"context={'1..' if is_mixed else ''}{context}"


def _matrix_bytes(shape: tuple[int, ...], dtype: str, is_quantised: bool) -> int:
    """Of one expert, scales included."""
    if is_quantised:
        return shape[0] * shape[1] + 4 * num_blocks(shape[0]) * num_blocks(shape[1])
    return shape[0] * shape[1] * _size(dtype)


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _those_that_count(platform: str, implementations: dict[str, Callable]) -> dict[str, Callable]:
    """On a CPU `xla` beside `reference`, elsewhere the platform's own kernel, if there is one, beside `xla`."""
    names = ("xla", "reference") if platform == "cpu" else (PREFERRED[platform], "xla")
    return {name: implementations[name] for name in names if name in implementations}


def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(seed), shape, "bfloat16" if dtype == FLOAT8.name else dtype)
    return drawn.astype(dtype)
