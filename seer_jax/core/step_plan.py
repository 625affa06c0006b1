"""What one dispatch of an instance computes."""

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from seer_jax.core.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class PrefillSlice:
    """`count` tokens of a sequence from position `start`, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the slice ends at the newest known token, so that the step samples the next one."""
        return self.start + self.count == self.sequence.num_tokens


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one dispatch computes.

    Attributes:
        decodes: Sequences with one pending token.
        prefills: Slices of sequences with more.
        num_steps: Decode steps at most before the host must look again.
        copies: (source page, target page) to be copied in all layers before the step.
    """

    decodes: SequenceOf[Sequence]
    prefills: SequenceOf[PrefillSlice]
    num_steps: int
    copies: SequenceOf[tuple[int, int]] = ()

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens of the rank that computes most of them."""
        by_rank = Counter()
        for piece in self.prefills:
            by_rank[piece.sequence.rank] += piece.count
        return max(by_rank.values(), default=0)
