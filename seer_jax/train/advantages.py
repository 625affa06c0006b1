"""Rewards to advantages, group by group (GRPO: the siblings of a response are its baseline)."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

LossName = Literal["grpo", "dr_grpo", "k15"]

STD_EPSILON = 1e-6


class Advantages(NamedTuple):
    """One value per sample, in the order of the samples.

    Attributes:
        values: float32 [N], how much better than its siblings a response was.
        weights: float32 [N], 1 where the reward is known, 0 where the reward function failed: such a sample is in no
            sum and in no denominator.
    """

    values: Float[np.ndarray, " N"]
    weights: Float[np.ndarray, " N"]


def group_advantages(
    rewards: Float[np.ndarray, " N"], group_ids: Integer[np.ndarray, " N"], loss: LossName
) -> Advantages:
    """Compare every reward with the mean of its group.

    `grpo` divides by the group's standard deviation (DeepSeekMath section 4.1); `dr_grpo` and `k15` do not: the
    division favours prompts that are nearly always or nearly never solved (Dr. GRPO section 3.1; Kimi K1.5 eq. 3).

    Args:
        rewards: Reward of every sample; NaN where the reward function failed.
        group_ids: Group of every sample, in any order.
        loss: Which objective the advantages are for.

    Returns:
        Advantages in float32. A group with fewer than two known rewards has no baseline and gets zeros.
    """
    rewards = np.asarray(rewards, np.float64)
    known = ~np.isnan(rewards)
    values = np.zeros(len(rewards))
    for group_id in np.unique(group_ids):
        members = known & (group_ids == group_id)
        if members.sum() < 2:
            continue
        group = rewards[members]
        centred = group - group.mean()
        values[members] = centred / (group.std() + STD_EPSILON) if loss == "grpo" else centred
    return Advantages(values.astype(np.float32), known.astype(np.float32))
