"""The drafter of one instance: an automaton per group, kept up with the requests that run here."""

from collections.abc import Sequence as SequenceOf

import numpy as np

from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.speculate import DraftBatch, SpeculationArgs, address_of, batch_speculate, speculate
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestId

PROMPT = -1
"""Name of the prompt among the requests of an automaton."""
MAX_AUTOMATA = 512
"""Automata kept; then the oldest is forgotten, and built again from its requests' tokens if one of them still runs."""


class DraftClient:
    """Drafts for sequences from what their groups have said on this instance.

    Args:
        args: How drafts are made; lines only.
        grouped: Whether siblings share an automaton; else each request drafts from itself (SuffixDecoding).
    """

    def __init__(self, args: SpeculationArgs, *, grouped: bool) -> None:
        self._args, self._grouped = args, grouped
        self._automata: dict[tuple[int, ...], SuffixAutomaton] = {}
        self._known: dict[RequestId, int] = {}

    def draft(self, sequences: SequenceOf[Sequence], budgets: np.ndarray) -> list[np.ndarray]:
        """Draft for sequences that are ready to decode.

        Args:
            sequences: B sequences.
            budgets: int32 [B]; draft tokens of each at most.

        Returns:
            int32 draft tokens of each.
        """
        for sequence in sequences:
            self._catch_up(sequence)
        # Only now: catching up may move the arrays of a group that was already seen.
        places = np.array(
            [address_of(self._automata[self._key(s)], s.chunk.request_id.index) for s in sequences], np.int64
        )
        out = DraftBatch.empty(len(sequences), max(1, int(budgets.max())))
        batch_speculate(places, budgets, self._args, out)
        return [out.token_ids[i, : out.num_nodes[i]] for i in range(len(sequences))]

    def observe(self, sequence: Sequence) -> None:
        """Take in what a sequence has said; for one that ends, so that its siblings know its end."""
        self._catch_up(sequence)

    def clear(self) -> None:
        """Forget all groups: new weights say something else."""
        self._automata.clear()
        self._known.clear()

    def warmup(self) -> None:
        """Load or compile the loops."""
        automaton = SuffixAutomaton(self._args.pattern_lookup_max)
        automaton.open(PROMPT)
        automaton.append(PROMPT, np.zeros(2, np.int32))
        speculate(automaton, [PROMPT], 1, self._args)

    def _key(self, sequence: Sequence) -> tuple[int, ...]:
        request_id = sequence.chunk.request_id
        return request_id[:1] if self._grouped else request_id

    def _catch_up(self, sequence: Sequence) -> None:
        """Append what a sequence has said since the last call."""
        request_id, num_prompt = sequence.chunk.request_id, sequence.chunk.num_prompt_tokens
        key = self._key(sequence)
        automaton = self._automata.get(key)
        if automaton is None:
            if len(self._automata) == MAX_AUTOMATA:
                self._forget_oldest()
            automaton = self._automata[key] = SuffixAutomaton(self._args.pattern_lookup_max)
            automaton.open(PROMPT)
            automaton.append(PROMPT, sequence.token_ids[:num_prompt])
        if request_id not in self._known:
            automaton.open(request_id.index, like=PROMPT)
            self._known[request_id] = num_prompt
        known = self._known[request_id]
        if known < sequence.num_tokens:
            automaton.append(request_id.index, sequence.token_ids[known : sequence.num_tokens])
            self._known[request_id] = sequence.num_tokens

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._automata))
        del self._automata[oldest]
        self._known = {known: count for known, count in self._known.items() if known[: len(oldest)] != oldest}


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
