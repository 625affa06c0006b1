"""Wider expert parallelism: instances joined for good.

Every instance has all experts, spread over its chips. Join W of them and each chip keeps a W-th of the experts that it
has: no weights move, what is freed is room for KV, and a step reads a W-th of the experts per chip. What it costs: all
ranks of all of them wait for the fullest one, and tokens travel further to their experts and back.
"""

import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.sim.workloads import Workload

USABLE_MEMORY = 0.9
"""Of a chip's memory, as in the sources of `cluster.kv_bytes_per_rank`."""


def can_widen(workload: Workload, width: int) -> bool:
    """Whether there are experts to spread, instances to join, and a measured exchange over so many chips."""
    chips = workload.exchange_s_per_layer[0]
    return (
        workload.exchange_layers > 0
        and workload.num_instances % width == 0
        and width * workload.chips_per_instance <= chips[-1]
    )


def widen(workload: Workload, width: int, *, faster_reads: bool = True) -> Workload:
    """The same chips as `1 / width` times as many instances, with attention as before and experts over all chips.

    Of the memory that the experts leave, KV gets the share that it has of what is free now. Every instance drafts for
    its own requests as before, so a draft token costs the joined batch `1 / width` as much. A step takes longer by the
    difference of the two exchanges at the bytes that were measured, which is more than a chip sends here: see
    `exchange` in configs/sim.

    Args:
        workload: With experts.
        width: Instances that become one.
        faster_reads: False: reading the experts takes as long as before, as if it were not the memory that a step
            waits for; then the room for KV is all that is won.

    Raises:
        ConfigError: If it cannot be, see `can_widen`.
    """
    if not can_widen(workload, width):
        raise ConfigError("width", f"is {width} with {workload.num_instances} instances", "a divisor of the instances")
    chips, times, share = workload.chips_per_instance, workload.times, workload.times.expert_share
    weight_bytes = times.parameters * times.bytes_per_parameter
    expert_bytes = weight_bytes * share / chips
    dense_bytes = weight_bytes * (1 - share) * workload.ranks_per_instance / chips
    free_bytes = USABLE_MEMORY * times.chip.memory_bytes - expert_bytes - dense_bytes
    kv_share = workload.kv_bytes_per_rank * workload.ranks_per_instance / chips / free_bytes
    freed_bytes = expert_bytes * (1 - 1 / width) * chips / workload.ranks_per_instance
    before_s, after_s = np.interp([chips, chips * width], *workload.exchange_s_per_layer).tolist()
    changes = {
        "cluster.num_instances": workload.num_instances // width,
        "cluster.chips_per_instance": chips * width,
        "cluster.ranks_per_instance": workload.ranks_per_instance * width,
        "cluster.kv_bytes_per_rank": workload.kv_bytes_per_rank + min(1.0, kv_share) * freed_bytes,
        "cluster.max_num_seqs": workload.max_num_seqs * width,
        "cluster.transfer_bytes_per_s": workload.transfer_bytes_per_s * width,
        "times.draft_overhead_per_token_s": times.draft_overhead_per_token_s / width,
        "times.step_overhead_s": times.step_overhead_s + workload.exchange_layers * (after_s - before_s),
    }
    if not faster_reads:  # As many bytes more as there are chips more.
        changes["model.parameters"] = times.parameters * (1 - share + width * share)
        changes["model.expert_share"] = width * share / (1 - share + width * share)
    return workload.with_values(changes, note=f"{width} instances joined")
