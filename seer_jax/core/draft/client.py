"""The drafter of one instance: an automaton per group, kept up with the requests that run here."""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.speculate import DraftBatch, SpeculationArgs, address_of, batch_speculate, speculate
from seer_jax.core.sequence import Sequence

PROMPT = -1
"""Name of the prompt among the requests of an automaton."""
MAX_AUTOMATA = 512
"""Automata kept beside those in use; one that was forgotten is built again from its requests' tokens when needed."""


@dataclass(frozen=True, eq=False)
class _Text:
    """What is known of a group, or of a request on its own; `num_known` counts each request's tokens in it."""

    automaton: SuffixAutomaton
    num_known: dict[int, int] = field(default_factory=dict)


class DraftClient:
    """Drafts for sequences from what their groups have said on this instance.

    Args:
        args: How drafts are made; lines only.
        grouped: Whether siblings share an automaton; else each request drafts from itself (SuffixDecoding).
    """

    def __init__(self, args: SpeculationArgs, *, grouped: bool) -> None:
        self._args, self._grouped = args, grouped
        # The one used longest ago comes first.
        self._texts: OrderedDict[tuple[int, ...], _Text] = OrderedDict()

    def draft(self, sequences: SequenceOf[Sequence], budgets: np.ndarray) -> list[np.ndarray]:
        """Draft for sequences that are ready to decode.

        Args:
            sequences: B sequences.
            budgets: int32 [B]; draft tokens of each at most.

        Returns:
            int32 draft tokens of each.
        """
        texts = [self.observe(sequence) for sequence in sequences]
        while len(self._texts) > MAX_AUTOMATA + len(sequences):
            self._texts.popitem(last=False)
        # Only now: taking in one request's tokens may move the arrays that its siblings' addresses point at.
        places = [address_of(t.automaton, s.chunk.request_id.index) for t, s in zip(texts, sequences, strict=True)]
        out = DraftBatch.empty(len(sequences), max(1, int(budgets.max())))
        batch_speculate(np.array(places, np.int64), budgets, self._args, out)
        return [out.token_ids[i, : out.num_nodes[i]] for i in range(len(sequences))]

    def observe(self, sequence: Sequence) -> _Text:
        """Take in what a sequence has said since the last call, so that its siblings know it too."""
        request_id, num_prompt = sequence.chunk.request_id, sequence.chunk.num_prompt_tokens
        key = request_id[:1] if self._grouped else request_id
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = _Text(SuffixAutomaton(self._args.pattern_lookup_max))
            text.automaton.open(PROMPT)
            text.automaton.append(PROMPT, sequence.token_ids[:num_prompt])
        self._texts.move_to_end(key)
        if request_id.index not in text.num_known:
            text.automaton.open(request_id.index, like=PROMPT)
            text.num_known[request_id.index] = num_prompt
        known = text.num_known[request_id.index]
        if known < sequence.num_tokens:
            text.automaton.append(request_id.index, sequence.token_ids[known : sequence.num_tokens])
            text.num_known[request_id.index] = sequence.num_tokens
        return text

    def clear(self) -> None:
        """Forget all groups: new weights say something else."""
        self._texts.clear()

    def warmup(self) -> None:
        """Load or compile the loops."""
        automaton = SuffixAutomaton(self._args.pattern_lookup_max)
        automaton.open(PROMPT)
        automaton.append(PROMPT, np.zeros(2, np.int32))
        speculate(automaton, [PROMPT], 1, self._args)


def count_accepted(drawn: np.ndarray, draft: np.ndarray, stop_token_ids: SequenceOf[int]) -> int:
    """Count the tokens that a verification step emits.

    Args:
        drawn: int32 [1 + N]; what the model says after the newest token and after each of N draft tokens.
        draft: int32 [N].
        stop_token_ids: Tokens that end a response.

    Returns:
        How many of the first of `drawn` are emitted: those up to the first that is not what was drafted, or stops.
    """
    for i, token in enumerate(draft):
        if drawn[i] != token or drawn[i] in stop_token_ids:
            return i + 1
    return len(drawn)
