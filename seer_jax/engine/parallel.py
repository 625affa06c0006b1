"""Attention, experts and draws on one device, or each device's share of them inside `shard_map`.

The compiler partitions plain XLA but no kernel, so on a mesh the operations that have kernels are divided by hand:
heads over "tensor", with the cache on every device; experts over "expert" and "tensor" together (`WHOLE_EXPERTS`), with
the tokens on every device and one all-reduce of what the experts say; the vocabulary over "tensor", with one small
all-reduce of what its parts would draw. The rest of a step is left to the compiler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from kernels_pallas.grouped_matmul import expert_parallel_mlp, grouped_mlp
from kernels_pallas.mla_attention import mla_attention
from kernels_pallas.tree_verify import Draws, tree_verify
from seer_jax.models.moe import ExpertMLP
from seer_jax.sharding import WHOLE_EXPERTS


class ParallelOps(NamedTuple):
    """The operations of a step that have kernels.

    Attributes:
        attention: `mla_attention`, of all heads.
        experts: `grouped_mlp`, of all experts.
        draw: `tree_verify`, from the whole vocabulary.
    """

    attention: Callable[..., Array]
    experts: ExpertMLP
    draw: Callable[..., Draws]


def parallel_ops(mesh: Mesh | None, implementation: str | None = None) -> ParallelOps:
    """Make the operations for the devices of an engine.

    Args:
        mesh: Axes as `sharding.MESH_AXES`; None = one device.
        implementation: What computes on each device; None chooses by platform.

    Returns:
        Operations to be traced under `jax.jit`; on a mesh their results are what one device computes, but for the
        rounding of the sum over devices.
    """
    if mesh is None:
        whole = (mla_attention, grouped_mlp, tree_verify)
        return ParallelOps(*(partial(operation, implementation=implementation) for operation in whole))
    shard = partial(jax.shard_map, mesh=mesh, check_vma=False)  # Kernels do not say over which axes results vary.
    everywhere, heads = PartitionSpec(), WHOLE_EXPERTS.partition_spec((None, None, "heads", None))
    experts = WHOLE_EXPERTS.partition_spec(("experts", None, None))

    def attention(q: Array, *arrays: Array, **options: Any) -> Array:
        attend = partial(mla_attention, implementation=implementation, **options)
        return shard(attend, in_specs=(heads,) + (everywhere,) * len(arrays), out_specs=heads)(q, *arrays)

    mlp = partial(
        expert_parallel_mlp,
        axis_name=WHOLE_EXPERTS.experts,
        tokens_are_sharded=False,
        implementation=implementation,
    )

    def run_experts(*arrays: Array) -> Array:  # Float8 experts have scales.
        in_specs = (everywhere,) * 3 + (experts,) * (len(arrays) - 3)
        return shard(mlp, in_specs=in_specs, out_specs=everywhere)(*arrays)

    draw = partial(tree_verify, axis_name=WHOLE_EXPERTS.vocab, implementation=implementation)
    head = WHOLE_EXPERTS.partition_spec((None, "vocab"))
    return ParallelOps(
        attention=attention,
        experts=run_experts,
        draw=shard(draw, in_specs=(everywhere, head) + (everywhere,) * 3, out_specs=everywhere),
    )


ONE_DEVICE = parallel_ops(None)
