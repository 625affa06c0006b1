"""StreamRL-Oracle, a baseline of the paper: groups sorted into buckets by their true lengths."""

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.request import RolloutRequest
from seer_jax.core.scheduling.base import PROBE_PRIORITY, Decision
from seer_jax.core.types import RequestId


@dataclass(frozen=True, kw_only=True)
class LengthBucket:
    """Groups of similar length and the instances that run them.

    Attributes:
        group_ids: Longest group first.
        instance_ids: Instances of the bucket.
        mean_length: Generated tokens of its requests on average, at least 1.
    """

    group_ids: tuple[int, ...]
    instance_ids: tuple[int, ...]
    mean_length: float


class StreamRLOraclePolicy:
    """Whole groups to the instances of their length bucket, longest first; fewer at a time where they are long.

    The paper only sketches it; this is our reading. The instances are dealt into `num_buckets` parts as even as can be
    and the groups, sorted by the longest true length in them, are cut so that every instance has about the same work:
    the sum of squared true lengths, since a request holds KV in proportion to its length for a time in proportion to
    it. (By the lengths alone the instances of long requests end far later than the others.) An instance takes a group
    while the requests in flight there and half the group's stay within the number whose prompt and mean length of the
    bucket fit in its pages: a group is taken or left as a whole, so this many are in flight on average. An empty
    instance takes any. All requests of a group go to one instance, in one piece, and nothing is reserved: they grow on
    demand and may be preempted. When an instance dies, groups are dealt anew over the others.

    For tests and simulation only: nobody knows the true lengths of a real rollout.

    Args:
        true_lengths: Tokens that each request of the iteration will generate, and no others'.
        num_buckets: Parts that the instances are split into; fewer if there are not so many instances.
    """

    def __init__(self, *, true_lengths: Mapping[RequestId, int], num_buckets: int = 4) -> None:
        self._true_lengths = true_lengths
        self._num_buckets = num_buckets
        # Follow from settings and live instances; remembered because they cost a sort.
        self._dealt: tuple[tuple[int, ...], tuple[LengthBucket, ...]] | None = None

    def buckets(self, instance_ids: tuple[int, ...]) -> tuple[LengthBucket, ...]:
        """Deal groups and instances into buckets, the longest first.

        Args:
            instance_ids: Live instances in ascending order; at least one.
        """
        if self._dealt is None or self._dealt[0] != instance_ids:
            self._dealt = (instance_ids, self._make_buckets(instance_ids))
        return self._dealt[1]

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Finish sending the group that was begun, else begin the longest that an instance of its bucket takes."""
        if not buffer.waiting or not loads:
            return None
        for bucket in self.buckets(tuple(sorted(loads))):
            for group_id in bucket.group_ids:
                if not buffer.is_waiting(group_id):
                    continue
                members = buffer.waiting_members(group_id)
                load = _choose(bucket, members, buffer, loads)
                if load is not None:
                    return Decision(
                        request=members[0],
                        instance_id=load.info.instance_id,
                        max_chunk_tokens=members[0].remaining_tokens,
                        num_reserved_pages=0,
                        priority=PROBE_PRIORITY,
                    )
                break  # Groups of a bucket go in order.
        return None

    def _make_buckets(self, instance_ids: tuple[int, ...]) -> tuple[LengthBucket, ...]:
        lengths: dict[int, list[int]] = {}
        for request_id, length in self._true_lengths.items():
            lengths.setdefault(request_id.group_id, []).append(length)
        order = sorted(lengths, key=lambda group_id: (-max(lengths[group_id]), group_id))
        work = list(itertools.accumulate(sum(length**2 for length in lengths[group_id]) for group_id in order))
        num_buckets, num_instances = min(self._num_buckets, len(instance_ids)), len(instance_ids)
        buckets, first_group, first_instance = [], 0, 0
        for number in range(1, num_buckets + 1):
            # Instances up to here do the same share of the work as they are of all instances.
            end_instance = number * num_instances // num_buckets
            end_group = bisect.bisect_left(work, work[-1] * end_instance / num_instances) + 1
            end_group = len(order) if number == num_buckets else min(end_group, len(order))
            group_ids = tuple(order[first_group:end_group])
            members = [length for group_id in group_ids for length in lengths[group_id]]
            buckets.append(
                LengthBucket(
                    group_ids=group_ids,
                    instance_ids=instance_ids[first_instance:end_instance],
                    mean_length=sum(members) / len(members) if members else 1.0,
                )
            )
            first_group, first_instance = max(first_group, end_group), end_instance
        return tuple(buckets)


def _choose(
    bucket: LengthBucket, members: list[RolloutRequest], buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]
) -> InstanceLoad | None:
    """Choose where the waiting requests of a group go, or None while no instance takes them."""
    first = members[0]
    for index in range(first.group.group_size):
        sibling = buffer.running.get(RequestId(first.request_id.group_id, index))
        if sibling is not None and sibling.instance_id is not None:
            return loads[sibling.instance_id]
    able = [load for load in loads.values() if load.max_request_tokens >= first.max_total_tokens]
    # A bucket may have no instance that is large enough; then any other must do.
    places = [load for load in able if load.info.instance_id in bucket.instance_ids] or able
    if not places:
        return None
    load = min(places, key=lambda load: (len(load.in_flight), load.info.instance_id))
    num_tokens = load.info.num_total_pages * load.info.page_size
    most = min(load.info.max_num_seqs, int(num_tokens / (first.num_prompt_tokens + bucket.mean_length)))
    return load if not load.in_flight or len(load.in_flight) + len(members) // 2 <= most else None
