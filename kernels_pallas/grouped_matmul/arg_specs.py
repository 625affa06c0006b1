"""Shapes at which the expert MLP is tested, compiled and measured."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.blocks import QUANTISED, num_blocks


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a model fixes."""

    experts: int
    """Of all devices together."""
    experts_per_token: int
    width: int
    expert_width: int
    dtype: str
    expert_parallel: tuple[int, ...]
    """Degrees over which the experts are divided."""
    quantised: tuple[bool, ...]
    """Whether the experts are float8 with scales."""


MODELS = {
    "tiny": Model(
        experts=8, experts_per_token=2, width=128, expert_width=256, dtype="float32",
        expert_parallel=(1, 4), quantised=(False, True),
    ),
    "moonlight": Model(
        experts=64, experts_per_token=6, width=2048, expert_width=1408, dtype="bfloat16",
        expert_parallel=(1, 8), quantised=(False,),
    ),
    "kimi_k2": Model(
        experts=384, experts_per_token=8, width=7168, expert_width=2048, dtype="bfloat16",
        expert_parallel=(16, 32), quantised=(False, True),
    ),
}  # fmt: skip
"""One layer of Kimi-K2's experts is 33.8 GB in bfloat16: more than a chip's share, so there is no degree 1."""

WORKS = {"decode4": 4, "decode32": 32, "decode64": 64, "verify": 256, "prefill": 512}
"""Tokens of a call: steps of 4, 32 and 64 requests, of 32 with 7 drafts each, and a slice of prompts."""


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """Arguments of one call of `grouped_mlp` on one shard of the experts, tokens replicated."""

    model: str
    work: str
    expert_parallel: int
    is_quantised: bool
    args: tuple[jax.ShapeDtypeStruct | None, ...]
    """x, expert_ids, expert_weights, gate_up, down, gate_up_scale, down_scale."""

    @property
    def name(self) -> str:
        """Unique among all, such as `kimi_k2-decode32-ep16-fp8`."""
        return f"{self.model}-{self.work}-ep{self.expert_parallel}" + ("-fp8" if self.is_quantised else "")

    @property
    def bytes_per_expert(self) -> int:
        """Weights and scales that a call must read for every expert that has a token here."""
        return sum(arg.size * arg.dtype.itemsize for arg in self.args[3:] if arg is not None) // self.args[3].shape[0]


def arg_specs(model: str) -> Iterator[ArgSpec]:
    """List the calls of a model.

    Args:
        model: A key of `MODELS`.

    Yields:
        One for every work, expert-parallel degree and type of weights.

    Raises:
        KeyError: If there is no such model.
    """
    of = MODELS[model]
    for work, tokens in WORKS.items():
        for degree in of.expert_parallel:
            for is_quantised in of.quantised:
                experts = of.experts // degree
                shapes = (experts, of.width, 2 * of.expert_width), (experts, of.expert_width, of.width)
                dtype = QUANTISED if is_quantised else of.dtype
                scales = [(experts, *map(num_blocks, shape[1:])) for shape in shapes]
                yield ArgSpec(
                    model=model,
                    work=work,
                    expert_parallel=degree,
                    is_quantised=is_quantised,
                    args=(
                        jax.ShapeDtypeStruct((tokens, of.width), of.dtype),
                        jax.ShapeDtypeStruct((tokens, of.experts_per_token), jnp.int32),
                        jax.ShapeDtypeStruct((tokens, of.experts_per_token), jnp.float32),
                        *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
                        *(jax.ShapeDtypeStruct(s, jnp.float32) if is_quantised else None for s in scales),
                    ),
                )
