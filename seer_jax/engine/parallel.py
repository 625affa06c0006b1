"""Attention, experts and draws on one device, or each device's share of them inside `shard_map`.

The compiler partitions plain XLA but no kernel, so on a mesh the operations that have kernels are divided by hand:
heads over "tensor", with the cache on every device of a rank; experts over all devices together (`WHOLE_EXPERTS`); the
vocabulary over "tensor", with one small all-reduce of what its parts would draw. The rest of a step is left to the
compiler.

"data" divides the requests. Each of its ranks has rows, pages and a cache of its own and runs the whole step for them,
inside a `shard_map` over that axis alone (`on_each_rank`); the operations above are divided inside it over the two
others. Only the experts know of other ranks: without any, every device has all tokens and one all-reduce adds what the
experts say; with them, the devices of a rank take a part of its tokens each and exchange them with all others.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from kernels_pallas._dispatch import KernelRefusedError, why_not_device
from kernels_pallas.grouped_matmul import expert_parallel_mlp, grouped_mlp
from kernels_pallas.mla_attention import mla_attention
from kernels_pallas.tree_verify import Draws, tree_verify
from seer_jax.core.errors import ConfigError
from seer_jax.models.config import DecoderConfig
from seer_jax.models.moe import ExpertMLP
from seer_jax.models.specs import decoder_specs, float8_experts_in
from seer_jax.sharding import WHOLE_EXPERTS, shardings_for

RANKS = "data"
"""The mesh axis of data-parallel attention."""
WITHIN_RANK = ("expert", "tensor")
BY_RANK = PartitionSpec(RANKS)
"""How caches (by pages), packed requests and outputs lie on a mesh: each rank has its own."""


class ParallelOps(NamedTuple):
    """The operations of a step that have kernels, and the one that has ranks end together.

    Attributes:
        attention: `mla_attention`, of all heads.
        experts: `grouped_mlp`, of all experts.
        draw: `tree_verify`, from the whole vocabulary.
        on_any_rank: Whether something is true on any rank.
    """

    attention: Callable[..., Array]
    experts: ExpertMLP
    draw: Callable[..., Draws]
    on_any_rank: Callable[[Bool[Array, ""]], Bool[Array, ""]]


def count_ranks(mesh: Mesh | None) -> int:
    """Data-parallel ranks of an instance; `mesh` has axes as `sharding.MESH_AXES`, None = one device."""
    return 1 if mesh is None else mesh.shape[RANKS]


def place(config: DecoderConfig, params: Mapping[str, Any], mesh: Mesh | None) -> tuple[Any, Any]:
    """Where weights, and caches [pages, page size, width], lie: as `jax.device_put` takes it, None = anywhere.

    Raises:
        ConfigError: If the model does not divide over the mesh.
    """
    if mesh is None or mesh.size == 1:
        device = None if mesh is None else mesh.devices.item()
        return device, device
    specs = decoder_specs(config, params["embed"].dtype, has_float8_experts=float8_experts_in(params))
    return shardings_for(specs, mesh, WHOLE_EXPERTS), by_rank(mesh)


def by_rank(mesh: Mesh) -> NamedSharding:
    """Where arrays with a part for each rank lie."""
    return NamedSharding(mesh, BY_RANK if count_ranks(mesh) > 1 else PartitionSpec())


def on_each_rank(step: Callable[..., Any], config: DecoderConfig, mesh: Mesh | None) -> Callable[..., Any]:
    """Let a step over (weights, caches, packed requests) run on every rank, for its own requests and pages."""
    if count_ranks(mesh) == 1:
        return step

    def of_rank(sharding: NamedSharding) -> PartitionSpec:
        return PartitionSpec(*(RANKS if isinstance(axes, tuple) and RANKS in axes else None for axes in sharding.spec))

    def run(params: Mapping[str, Any], caches: Any, packed: Array) -> Any:
        in_specs = (jax.tree.map(of_rank, place(config, params, mesh)[0]), BY_RANK, BY_RANK)
        of_ranks = jax.shard_map(
            step, mesh=mesh, axis_names={RANKS}, in_specs=in_specs, out_specs=BY_RANK, check_vma=False
        )
        return of_ranks(params, caches, packed)

    return run


def parallel_ops(mesh: Mesh | None, implementation: str | None = None) -> ParallelOps:
    """Make the operations for the devices of an engine.

    Args:
        mesh: Axes as `sharding.MESH_AXES`; None = one device.
        implementation: What computes on each device; None chooses by platform.

    Returns:
        Operations to be traced under `jax.jit`, and `on_each_rank`; on a mesh their results are what one device
        computes, but for the rounding of the sum over devices. Tracing raises ConfigError where the implementation that
        was named cannot serve.
    """
    named = partial(_named, implementation=implementation)
    if mesh is None:
        return ParallelOps(named(mla_attention), named(grouped_mlp), named(tree_verify), lambda x: x)
    has_ranks = count_ranks(mesh) > 1
    where = {"axis_names": set(WITHIN_RANK)} if has_ranks else {"mesh": mesh}
    shard = partial(jax.shard_map, **where, check_vma=False)  # Kernels do not say over which axes results vary.
    everywhere, heads = PartitionSpec(), WHOLE_EXPERTS.partition_spec((None, None, "heads", None))

    def attention(q: Array, *arrays: Array, **options: Any) -> Array:
        attend = partial(named(mla_attention), **options)
        return shard(attend, in_specs=(heads,) + (everywhere,) * len(arrays), out_specs=heads)(q, *arrays)

    mlp = partial(
        named(expert_parallel_mlp),
        axis_name=WHOLE_EXPERTS.experts,
        tokens_are_sharded=has_ranks,
        exchange="padded" if mesh.devices.flat[0].platform == "cpu" else "ragged",
    )
    experts = PartitionSpec(WITHIN_RANK)
    run_mlp = _divide_tokens(mlp) if has_ranks else mlp

    def run_experts(*arrays: Array) -> Array:  # Float8 experts have scales.
        in_specs = (everywhere,) * 3 + (experts,) * (len(arrays) - 3)
        return shard(run_mlp, in_specs=in_specs, out_specs=everywhere)(*arrays)

    draw = partial(named(tree_verify), axis_name=WHOLE_EXPERTS.vocab)
    head = WHOLE_EXPERTS.partition_spec((None, "vocab"))
    return ParallelOps(
        attention=attention,
        experts=run_experts,
        draw=shard(draw, in_specs=(everywhere, head) + (everywhere,) * 3, out_specs=everywhere),
        on_any_rank=(lambda x: jax.lax.psum(x.astype(jnp.int32), RANKS) > 0) if has_ranks else (lambda x: x),
    )


def name_implementation(kernels: str, device: jax.Device) -> str | None:
    """Turn `engine.kernels` into the name of an implementation.

    Args:
        kernels: The setting.
        device: A device of the engine.

    Returns:
        The name; None = chosen by platform.

    Raises:
        ConfigError: If it does not run on such a device.
    """
    if (reason := why_not_device(kernels, device)) is not None:
        raise ConfigError("engine.kernels", reason, "give auto or xla")
    return None if kernels == "auto" else kernels


def _named(operation: Callable[..., Any], *, implementation: str | None) -> Callable[..., Any]:
    """Bind the implementation, and tell its refusals as errors of `engine.kernels`."""

    def run(*arrays: Array, **options: Any) -> Any:
        try:
            return operation(*arrays, implementation=implementation, **options)
        except KernelRefusedError as error:
            raise ConfigError("engine.kernels", str(error), "mend that, or give auto or xla") from error

    return run


def _divide_tokens(mlp: ExpertMLP) -> ExpertMLP:
    """Let each device of a rank send an equal part of the rank's tokens, and have all that comes back.

    By name, not by `in_specs`: the compiler would take up the hint and divide tokens, in place of heads and widths,
    everywhere else too.
    """

    def run(x: Array, expert_ids: Array, weights: Array, *experts: Array) -> Array:
        part = -(-len(x) // jax.lax.axis_size(WITHIN_RANK))
        padding = ((0, part * jax.lax.axis_size(WITHIN_RANK) - len(x)), (0, 0))

        def own(rows: Array, value: int = 0) -> Array:
            rows = jnp.pad(rows, padding, constant_values=value)
            return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(WITHIN_RANK) * part, part)

        # What is added goes to no expert.
        out = mlp(own(x), own(expert_ids, -1), own(weights), *experts)
        return jax.lax.all_gather(out, WITHIN_RANK, tiled=True)[: len(x)]

    return run


ONE_DEVICE = parallel_ops(None)
