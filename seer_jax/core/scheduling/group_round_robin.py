"""The baseline of the paper's figures: whole groups to instances in turn, as veRL does."""

from collections.abc import Mapping
from dataclasses import dataclass

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.scheduling.base import PROBE_PRIORITY, Decision


@dataclass(frozen=True, kw_only=True)
class GroupRoundRobinPolicy:
    """Send every request at once, whole, to the instance whose turn its group is.

    Nothing is reserved: an instance admits while pages last, preempts its youngest request when they run out and
    recomputes it. Requests that come back because their instance was lost go, again group by group, to the remaining
    instances in turn.

    Attributes:
        share_prompts: As in `ReservingPolicy`.
    """

    share_prompts: bool = False

    def decide(self, buffer: RequestBuffer, loads: Mapping[int, InstanceLoad]) -> Decision | None:
        """Take the request that has waited longest; its instance follows from its group's position."""
        request = buffer.oldest()
        if request is None:
            return None
        able = sorted(i for i, load in loads.items() if load.max_request_tokens >= request.max_total_tokens)
        if not able:
            return None
        instance_id = able[request.group_position % len(able)]
        num_shared_tokens = request.num_prompt_tokens - 1 if self.share_prompts else 0
        return Decision(
            request=request,
            instance_id=instance_id,
            max_chunk_tokens=request.remaining_tokens,
            num_reserved_pages=0,
            num_shared_pages=num_shared_tokens // loads[instance_id].info.page_size,
            priority=PROBE_PRIORITY,
        )
