"""How long-tailed and how predictable response lengths are: the two properties that Seer lives on (section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LengthStatistics:
    """Statistics of response lengths.

    Attributes:
        mean: Mean length, in tokens.
        limit_over_mean: Generation limit / mean: how much a reservation for the worst case would waste.
        group_correlation: ICC(1), the correlation of two lengths of the same group: how much a probe tells. nan if
            there is only one group, which says nothing about it.
    """

    mean: float
    limit_over_mean: float
    group_correlation: float


def length_statistics(lengths_by_group: Sequence[Sequence[int]] | np.ndarray, max_tokens: int) -> LengthStatistics:
    """Measure mean, tail and within-group correlation of response lengths.

    ICC(1) = (MSB - MSW) / (MSB + (k - 1) MSW) with the mean squares between and within groups of size k, the one-way
    random-effects intraclass correlation (Shrout and Fleiss 1979).

    Args:
        lengths_by_group: Lengths in tokens [num_groups, group_size], at least 1 group of at least 2.
        max_tokens: Generation limit of a response, in tokens.

    Returns:
        The statistics; the correlation is 0 if all lengths are equal, nan for a single group.

    Raises:
        ValueError: If there is no group, a group has fewer than two responses, or groups differ in size.
    """
    lengths = np.asarray(lengths_by_group, np.float64)
    if lengths.ndim != 2 or lengths.shape[0] < 1 or lengths.shape[1] < 2:
        raise ValueError(f"need groups of at least 2 lengths each, got shape {lengths.shape}")
    return LengthStatistics(
        mean=float(lengths.mean()),
        limit_over_mean=float(max_tokens / lengths.mean()),
        group_correlation=_correlate_within_groups(lengths) if len(lengths) > 1 else float("nan"),
    )


def _correlate_within_groups(lengths: np.ndarray) -> float:
    num_groups, group_size = lengths.shape
    group_means = lengths.mean(axis=1)
    between = group_size * np.sum((group_means - lengths.mean()) ** 2) / (num_groups - 1)
    within = np.sum((lengths - group_means[:, None]) ** 2) / (num_groups * (group_size - 1))
    spread = between + (group_size - 1) * within
    return float((between - within) / spread) if spread > 0 else 0.0
