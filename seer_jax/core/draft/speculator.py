"""What one instance drafts before a decode step, how much of it is verified, and what is learnt from the outcome."""

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from seer_jax.config.schema import SpeculationConfig
from seer_jax.core.draft.acceptance import AcceptanceStats
from seer_jax.core.draft.budget import DraftBudgetPolicy, ExpectedGainBudget, FixedBudget, PaperBudget
from seer_jax.core.draft.client import DraftClient
from seer_jax.core.draft.speculate import DraftBatch, SpeculationArgs
from seer_jax.core.latency import StepTimeModel
from seer_jax.core.scheduling.base import PROBE_PRIORITY
from seer_jax.core.sequence import Sequence

STEPS_BETWEEN_DRAFTS = 8
"""Plain decode steps after which drafting is tried again, while it is not in vain."""
MAX_PAUSE = 16
"""Dispatches for which a batch size at which drafting was in vain is left alone, at most."""
FOLLOWING = 0.2
"""Weight of the newest dispatch in a measured rate."""
FORGIVENESS = 1.02
"""What a rate that lost grows by each time it keeps drafts from being verified, so that they are tried again."""
VERIFICATIONS_BETWEEN_PLAIN = 64
"""Verifications after which plain decoding shows its rate once more: machines change."""
TREE_TOP_K = 4
"""Children of a node at most in `grouped_tree`; lines have one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """Drafts to be verified.

    Attributes:
        sequences: B sequences.
        is_probe: bool [B].
        batch: Drafts; row i is sequence i's. Overwritten by the next proposal.
        num_nodes: int32 [B]; how many of each are to be verified.
    """

    sequences: SequenceOf[Sequence]
    is_probe: np.ndarray
    batch: DraftBatch
    num_nodes: np.ndarray


@dataclass
class _Record:
    """How drafting went for one number of sequences.

    Attributes:
        plain_rate: Tokens per second of plain decoding; 0 = not seen yet.
        verify_rate: Tokens per second of verification, drafting and all; 0 = not seen yet.
        num_since_plain: Verifications since plain decoding was last seen.
        num_refusals: How often in a row drafting was in vain.
        pause: Dispatches until it is tried again.
    """

    plain_rate: float = 0.0
    verify_rate: float = 0.0
    num_since_plain: int = 0
    num_refusals: int = 0
    pause: int = 0

    @property
    def lacks_plain(self) -> bool:
        """Whether plain decoding should show its rate."""
        return not self.plain_rate or self.num_since_plain >= VERIFICATIONS_BETWEEN_PLAIN

    @property
    def is_slower(self) -> bool:
        """Whether verification turned out slower, whatever the profile says."""
        return 0 < self.verify_rate < self.plain_rate

    def refuse(self) -> None:
        """Leave this number of sequences alone, longer each time."""
        self.num_refusals += 1
        self.pause = min(MAX_PAUSE, 2**self.num_refusals) - 1


class Speculator:
    """Drafts for the sequences of one instance.

    Args:
        config: Whether and how to draft; `mode` is not "off".
        tile: Tokens of a request that attend together in verification.

    Attributes:
        client: What the groups have said.
        stats: How well their words were chosen.
    """

    def __init__(self, config: SpeculationConfig, tile: int = 1) -> None:
        self.config, self._tile = config, tile
        args = SpeculationArgs(
            max_spec_tokens=config.max_draft_tokens,
            min_probability=config.min_probability,
            top_k=TREE_TOP_K if config.mode == "grouped_tree" else 1,
        )
        self.client = DraftClient(args, grouped=config.mode != "suffix", ttl_seconds=config.group_ttl_s)
        self.stats = AcceptanceStats(config.max_draft_tokens)
        self._policy: DraftBudgetPolicy = FixedBudget(tile=tile)
        self._records: dict[int, _Record] = defaultdict(_Record)

    def use_times(self, times: StepTimeModel) -> None:
        """Weigh drafts with the time that steps take; until then, and for `budget` "fixed", all are verified."""
        config = self.config
        match config.budget:
            case "expected_gain":
                self._policy = ExpectedGainBudget(times=times, priority_factor=config.priority_factor, tile=self._tile)
            case "mba" | "mba_paper":
                self._policy = PaperBudget(
                    times=times,
                    stats=self.stats,
                    gamma_max=config.max_draft_tokens,
                    priority_factor=config.priority_factor,
                    benefit="expected_gain" if config.budget == "mba" else "paper",
                    tile=self._tile,
                )

    def is_in_vain(self, num_sequences: int) -> bool:
        """Whether drafting for so many sequences was in vain for some time."""
        return 2 ** self._records[num_sequences].num_refusals >= MAX_PAUSE

    def note_plain_steps(self, sequences: SequenceOf[Sequence], num_steps: int, seconds: float) -> None:
        """Take in how long a dispatch of plain decoding took."""
        record = self._records[len(sequences)]
        record.plain_rate = _follow(record.plain_rate, len(sequences) * num_steps / seconds)
        record.num_since_plain = 0

    def max_plain_steps(self, num_sequences: int) -> int | None:
        """Decode steps after which drafting should be looked at again; None = whenever the dispatch ends."""
        return None if self._records[num_sequences].num_refusals else STEPS_BETWEEN_DRAFTS

    def propose(self, sequences: SequenceOf[Sequence], page_size: int, room_tokens: int) -> Proposal | None:
        """Draft for sequences that are ready to decode.

        Args:
            sequences: B sequences.
            page_size: Tokens per KV page.
            room_tokens: Tokens that one step can verify, in whole tiles, the newest one of each sequence included.

        Returns:
            What to verify; None if plain decoding is faster, or nothing is known to draft from.
        """
        num_requests, record = len(sequences), self._records[len(sequences)]
        if record.pause or (self.config.budget != "fixed" and record.lacks_plain):
            record.pause = max(0, record.pause - 1)
            return None
        # Nodes need slots for their KV. A line longer than what a request may still say would be waste.
        most, is_line = self.config.max_draft_tokens, self.config.mode != "grouped_tree"
        rooms = [
            min(len(s.pages) * page_size - s.num_tokens, s.limit - s.num_tokens - 1 if is_line else most, most)
            for s in sequences
        ]
        batch = self.client.draft(sequences, np.maximum(rooms, 0).astype(np.int32), self.stats.calibration)
        if not batch.num_nodes[:num_requests].any():
            return None
        is_probe = np.array([s.chunk.priority == PROBE_PRIORITY for s in sequences])
        num_nodes = self._policy.allocate(is_probe, batch, _mean_context(sequences), room_tokens)
        if not num_nodes.any():
            self.stats.relax()
            record.refuse()
            return None
        if self.config.budget != "fixed" and record.is_slower:
            record.verify_rate *= FORGIVENESS
            record.refuse()
            return None
        record.num_refusals = 0
        record.num_since_plain += 1
        return Proposal(sequences=sequences, is_probe=is_probe, batch=batch, num_nodes=num_nodes)

    def warmup(self) -> None:
        """Load or compile the loops of drafting and learning."""
        self.client.warmup()
        batch, none = DraftBatch.empty(1, 1), np.zeros(1, np.int32)
        self.stats.record(np.zeros(1, bool), batch, none, np.zeros((1, 1), np.int32), none)

    def learn(self, proposal: Proposal, emitted: SequenceOf[np.ndarray], seconds: float) -> None:
        """Take in what the verification of a proposal emitted.

        Args:
            proposal: The latest one.
            emitted: int32 tokens of each sequence.
            seconds: What it took, from drafting on.
        """
        record = self._records[len(emitted)]
        record.verify_rate = _follow(record.verify_rate, sum(map(len, emitted)) / seconds)
        counts = np.array([len(token_ids) for token_ids in emitted], np.int32)
        table = np.zeros((len(emitted), 1 + self.config.max_draft_tokens), np.int32)
        for row, token_ids in zip(table, emitted, strict=True):
            row[: len(token_ids)] = token_ids
        self.stats.record(proposal.is_probe, proposal.batch, proposal.num_nodes, table, counts)


def _mean_context(sequences: SequenceOf[Sequence]) -> float:
    return sum(sequence.num_tokens for sequence in sequences) / len(sequences)


def _follow(rate: float, seen: float) -> float:
    return rate + FOLLOWING * (seen - rate) if rate else seen
