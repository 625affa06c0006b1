"""What verification teaches: how far the counts can be trusted, and how often drafts are accepted at each position."""

import numpy as np

from seer_jax.core.draft.kernels import NUM_BINS, compiled
from seer_jax.core.draft.speculate import DraftBatch

PRIOR = 8.0
"""Weight of what is believed before anything was seen: as so many trials of a position, or expected acceptances."""
PRIOR_ACCEPTANCE = 0.5
"""Acceptance of a position before anything was seen; real groups have 0.4 (no sibling) to 0.6 (15 of them)."""
MEMORY = 256.0
"""A count above it is halved with all that belongs to it: the policy that accepts changes with every iteration."""
RELAXATION = 0.98
"""What is left of the statistics after one `relax`; half after 34, and then soon so little that the prior rules."""
OTHER, PROBE = range(2)
TRIALS, SUCCESSES = range(2)


class AcceptanceStats:
    """Running statistics of verified drafts.

    Two views of the same outcomes. Per bin, that is by length of the context whose counts proposed a node: how often it
    was right, given that its parent was, against how often the counts expect it. Per class (probes and others, Seer's
    high and low priority) and position: how often one of the nodes there was right if the path so far was and went on.

    On real groups, half of them to learn and half to predict, the log loss of a node is 0.625 as counted, 0.598 with
    16 bins of what the counts say, 0.580 with the 16 lengths, and 0.575 with both, which decides no better.

    Args:
        max_depth: Positions that are told apart; deeper nodes count for the bins only.
    """

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        # What the counts expected to be right, and what was: a bin's weight is the first of them.
        self._bins = np.zeros((NUM_BINS, 2))
        self._positions = np.zeros((2, max_depth, 2))

    def record(
        self, is_probe: np.ndarray, batch: DraftBatch, num_verified: np.ndarray, emitted: np.ndarray, counts: np.ndarray
    ) -> None:
        """Take in the outcome of one verification step.

        Every child of the newest token, and of every accepted node, is a trial: it was right if it is the token that
        was emitted there. What lies below a wrong node teaches nothing.

        Args:
            is_probe: bool [B].
            batch: The drafts, of at least B requests; the first B rows are meant.
            num_verified: int32 [B]; so many of the first nodes of each row were verified.
            emitted: int32 [B, D]; tokens that the step emitted, padded.
            counts: int32 [B]; how many of them are real.
        """
        _record(
            is_probe,
            batch.token_ids,
            batch.parents,
            batch.conditionals,
            batch.bins,
            num_verified,
            emitted,
            counts,
            self._bins,
            self._positions,
        )
        for pairs in (self._bins, *self._positions):
            pairs[pairs[:, TRIALS] > MEMORY] /= 2

    @property
    def calibration(self) -> np.ndarray:
        """float32 [NUM_BINS]; how much rarer or commoner than expected, 1 at first; for `batch_speculate`."""
        return ((self._bins[:, SUCCESSES] + PRIOR) / (self._bins[:, TRIALS] + PRIOR)).astype(np.float32)

    @property
    def alpha(self) -> float:
        """Mean acceptance of a position that was drafted, in (0, 1)."""
        trials, successes = self._positions.sum((0, 1)).tolist()
        return (successes + PRIOR * PRIOR_ACCEPTANCE) / (trials + PRIOR)

    def beta(self, is_probe: bool) -> np.ndarray:
        """Acceptance by position, given that all before were accepted.

        Args:
            is_probe: Of which class.

        Returns:
            float64 [max_depth], `beta[0]` being the paper's beta[1]; near `alpha` where little was seen.
        """
        pairs = self._positions[PROBE if is_probe else OTHER]
        return (pairs[:, SUCCESSES] + PRIOR * self.alpha) / (pairs[:, TRIALS] + PRIOR)

    def relax(self) -> None:
        """Forget a little, towards the prior.

        To be called when there were drafts and none was verified: nothing is learnt then, and what made speculation
        look bad would hold for ever.
        """
        self._bins *= RELAXATION
        self._positions *= RELAXATION


@compiled
def _record(is_probe, token_ids, parents, conditionals, bins, num_verified, emitted, counts, of_bins, of_positions):
    path_length = np.empty(token_ids.shape[1], np.int64)  # of an accepted node, itself included; -1: not accepted
    for r in range(len(counts)):
        num_tried = 0
        of_class = of_positions[int(is_probe[r])]
        for node in range(num_verified[r]):
            parent = parents[r, node]
            position = path_length[parent] if parent >= 0 else 0
            path_length[node] = -1
            if position < 0 or position >= counts[r]:
                continue
            place = bins[r, node]
            of_bins[place, TRIALS] += conditionals[r, node]
            if position == num_tried:
                num_tried += 1
                if position < len(of_class):
                    of_class[position, TRIALS] += 1
            if token_ids[r, node] == emitted[r, position]:
                path_length[node] = position + 1
                of_bins[place, SUCCESSES] += 1
                if position < len(of_class):
                    of_class[position, SUCCESSES] += 1
