"""Time of every kernel implementation beside its naive reference, with the work it does.

    python scripts/bench_kernels.py --json

Shapes are those of the 4-layer, 256-wide benchmark model in decode and prefill, and of the tiny_math model in training.
Operations and bytes are what the definition needs (weights of the experts in use, rows up to each position, once each),
so GFLOP/s and GB/s are useful rates, whatever an implementation does beyond.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas._dispatch import PREFERRED, UNMEASURED
from kernels_pallas.gqa_attention.api import IMPLEMENTATIONS as GQA_ATTENTION
from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS as GROUPED_MLP
from kernels_pallas.kv_update.api import IMPLEMENTATIONS as KV_UPDATE
from kernels_pallas.mla_attention import pad_row_width
from kernels_pallas.mla_attention.api import IMPLEMENTATIONS as MLA_ATTENTION
from kernels_pallas.tree_verify import tree_verify
from kernels_pallas.tree_verify.api import IMPLEMENTATIONS as TREE_VERIFY
from kernels_pallas.tree_verify.arg_specs import ArgSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel: Name.
        shape: The shape in words.
        implementations: Name -> function.
        advance: `(function, first, *rest) -> first`: one call, its result fed back, so that calls cannot be elided.
        arrays: first and rest.
        flops: Operations that the definition needs.
        num_bytes: Bytes that it must read and write.
    """

    kernel: str
    shape: str
    implementations: dict[str, Callable]
    advance: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]
    flops: float
    num_bytes: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    rows = []
    attention_cases = (*mla_attention_cases(), *gqa_attention_cases())
    for case in (*grouped_mlp_cases(), *attention_cases, *kv_update_cases(), *tree_verify_cases()):
        if args.kernel in case.kernel:
            rows += measure_case(case)
    if args.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}))


def measure_case(case: Case) -> list[dict]:
    """Time every implementation; prints a line for each."""
    times = {name: measure(functools.partial(case.advance, f), case.arrays) for name, f in case.implementations.items()}
    rows = []
    for name, seconds in times.items():
        row = {
            "kernel": case.kernel,
            "shape": case.shape,
            "implementation": name,
            "us": round(seconds * 1e6, 1),
            "gflop_per_s": round(case.flops / seconds / 1e9, 2),
            "gb_per_s": round(case.num_bytes / seconds / 1e9, 2),
            "speedup": round(times["reference"] / seconds, 2),
        }
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def measure(advance: Callable[..., jax.Array], arrays: tuple[jax.Array, ...]) -> float:
    """Seconds of one call: the best of several loops on the device, each at least 20 ms long."""

    @jax.jit
    def run(repeats: jax.Array, *arrays: jax.Array) -> jax.Array:
        # The barrier keeps work on arrays that no call changes (a gather of the cache) inside the loop.
        def body(_: jax.Array, first: jax.Array) -> jax.Array:
            return advance(*jax.lax.optimization_barrier((first, *arrays[1:])))

        return jax.lax.fori_loop(0, repeats, body, arrays[0])

    def seconds(repeats: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(jnp.int32(repeats), *arrays))
        return time.perf_counter() - started

    seconds(1)
    repeats = max(1, round(0.02 / seconds(1)))
    return min(seconds(repeats) for _ in range(7)) / repeats


def grouped_mlp_cases() -> Iterator[Case]:
    """Decode: 8 experts of 128, top 2, 256 wide. Training: 8 experts of 96, top 2, 128 wide, with the backward pass."""
    for tokens in (1, 4, 8, 16, 32, 256):
        yield _grouped_mlp_case("decode", tokens, 256, 128, _grouped_mlp_forward, passes=1)
    for tokens in (4096, 8192):
        yield _grouped_mlp_case("training", tokens, 128, 96, _grouped_mlp_gradient, passes=3)


def _grouped_mlp_case(use: str, tokens: int, model: int, ffn: int, advance: Callable, passes: int) -> Case:
    experts, chosen = 8, 2
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :chosen].astype(np.int32)
    weights = 3 * model * ffn
    return Case(
        kernel="grouped_mlp",
        shape=f"{use}: T={tokens} M={model} E={experts} K={chosen} F={ffn}",
        implementations=_those_that_run_here(GROUPED_MLP),
        advance=advance,
        arrays=(
            _normal(rng, tokens, model),
            jnp.asarray(ids),
            jnp.full((tokens, chosen), 0.5),
            _normal(rng, experts, model, 2 * ffn) * model**-0.5,
            _normal(rng, experts, ffn, model) * ffn**-0.5,
        ),
        flops=passes * 2 * tokens * chosen * weights,
        num_bytes=4 * (passes * len(np.unique(ids)) * weights + 2 * tokens * model),
    )


def _grouped_mlp_forward(function: Callable, x: jax.Array, *rest: jax.Array) -> jax.Array:
    return x + 1e-3 * function(x, *rest)


def _grouped_mlp_gradient(function: Callable, x: jax.Array, ids: jax.Array, *rest: jax.Array) -> jax.Array:
    def loss(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(function(x, ids, *rest)))

    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(x, *rest)
    return x + 1e-9 * (grads[0] + sum(jnp.sum(grad) for grad in grads[1:]))


def mla_attention_cases() -> Iterator[Case]:
    """4 heads, rows of 64 + 16, pages of 16: decode at full and at mixed contexts, and prefill tiles."""
    for tiles, tile, context, mixed in ((1, 1, 256, False), (16, 1, 256, False), (16, 1, 1024, False)):
        yield _mla_attention_case(tiles, tile, context, mixed)
    yield _mla_attention_case(16, 1, 1024, True)
    yield _mla_attention_case(16, 16, 256, False)


def _mla_attention_case(tiles: int, tile: int, context: int, mixed: bool) -> Case:
    heads, value, width, page = 4, 64, 80, 16
    rng = np.random.default_rng(0)
    tables, limits, seen, read = _paged_contexts(rng, tiles, tile, context, page, mixed)

    def advance(function: Callable, q: jax.Array, *rest: jax.Array) -> jax.Array:
        out = function(q, *rest, value_width=value, scale=width**-0.5)
        return q.at[..., :value].add(1e-3 * out)

    return Case(
        kernel="mla_attention",
        shape=f"N={tiles} Tq={tile} H={heads} W={width} context={'1..' if mixed else ''}{context}",
        implementations=_those_that_run_here(MLA_ATTENTION),
        advance=advance,
        arrays=(
            _normal(rng, tiles, tile, heads, width),
            _normal(rng, tables.size + 1, page, pad_row_width(width, jax.default_backend())),
            tables,
            limits,
            None,
            None,
        ),
        flops=2 * seen * heads * (width + value),
        num_bytes=4 * (read * width + tiles * tile * heads * (width + value)),
    )


def gqa_attention_cases() -> Iterator[Case]:
    """8 heads of 64 that share 2 KV heads, pages of 16: the same contexts and tiles."""
    for tiles, tile, context, mixed in ((1, 1, 256, False), (16, 1, 256, False), (16, 1, 1024, False)):
        yield _gqa_attention_case(tiles, tile, context, mixed)
    yield _gqa_attention_case(16, 1, 1024, True)
    yield _gqa_attention_case(16, 16, 256, False)


def _gqa_attention_case(tiles: int, tile: int, context: int, mixed: bool) -> Case:
    heads, kv_heads, head_dim, page = 8, 2, 64, 16
    rng = np.random.default_rng(0)
    tables, limits, seen, read = _paged_contexts(rng, tiles, tile, context, page, mixed)
    return Case(
        kernel="gqa_attention",
        shape=f"N={tiles} Tq={tile} H={heads}/{kv_heads} D={head_dim} context={'1..' if mixed else ''}{context}",
        implementations=_those_that_run_here(GQA_ATTENTION),
        advance=lambda function, q, *rest: q + 1e-3 * function(q, *rest, scale=head_dim**-0.5),
        arrays=(
            _normal(rng, tiles, tile, heads, head_dim),
            _normal(rng, tables.size + 1, page, 2 * kv_heads * head_dim),
            tables,
            limits,
            None,
            None,
        ),
        flops=2 * seen * heads * 2 * head_dim,
        num_bytes=4 * (read * 2 * kv_heads * head_dim + 2 * tiles * tile * heads * head_dim),
    )


def _paged_contexts(
    rng: np.random.Generator, tiles: int, tile: int, context: int, page: int, mixed: bool
) -> tuple[jax.Array, jax.Array, int, int]:
    """Block tables, limits, (query, row) pairs that the queries see, and rows that the tiles must read."""
    last = rng.integers(tile, context, tiles) if mixed else np.full(tiles, context - 1)
    first = (last - tile + 1).astype(np.int32)
    tables = 1 + rng.permutation(tiles * context // page).reshape(tiles, -1).astype(np.int32)
    limits = first[:, None] + np.arange(1, tile + 1, dtype=np.int32)
    return jnp.asarray(tables), jnp.asarray(limits), int(limits.sum()), int(last.sum()) + tiles


def kv_update_cases() -> Iterator[Case]:
    """A decode step's and a prefill step's rows of 80 into 1024 pages of 16."""
    for tokens in (16, 272):
        rng = np.random.default_rng(0)
        slots = rng.permutation(1024 * 16)[:tokens].astype(np.int32)
        yield Case(
            kernel="kv_update",
            shape=f"T={tokens} W=80",
            implementations=KV_UPDATE,
            advance=lambda function, cache, rows, slots: function(cache, rows, slots),
            arrays=(_normal(rng, 1024, 16, 80), _normal(rng, tokens, 80), jnp.asarray(slots)),
            flops=0,
            num_bytes=2 * 4 * tokens * 80,
        )


def tree_verify_cases() -> Iterator[Case]:
    """tiny_math's vocabulary, and Moonlight's with few rows; float32, all rows at temperature 1."""
    for rows, width, vocab in ((16, 128, 264), (64, 128, 264), (1, 2048, 163_840), (4, 2048, 163_840)):
        spec = ArgSpec(rows=rows, width=width, vocab=vocab, dtype="float32")
        rng = np.random.default_rng(0)
        names = _those_that_run_here(TREE_VERIFY)
        yield Case(
            kernel="tree_verify",
            shape=f"E={rows} M={width} V={vocab}",
            implementations={name: functools.partial(tree_verify, implementation=name) for name in names},
            advance=lambda function, hidden, *rest: hidden + 1e-6 * function(hidden, *rest).logprobs[:, None],
            arrays=(
                _normal(rng, rows, width),
                _normal(rng, width, vocab) * width**-0.5,
                jnp.asarray(rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)),
                jnp.arange(rows, dtype=jnp.int32),
                jnp.ones(rows),
            ),
            flops=spec.flops,
            num_bytes=spec.num_bytes,
        )


def _those_that_run_here(implementations: dict[str, Callable]) -> dict[str, Callable]:
    """All but the kernels of other platforms, and those of this one that serve only by name: cases are in float32."""
    own = {PREFERRED.get(jax.default_backend())} - UNMEASURED
    return {name: f for name, f in implementations.items() if name in own or not name.startswith("pallas_")}


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))


if __name__ == "__main__":
    main()
