"""The drafter of one instance: an automaton per group, kept up with what runs here and what the draft server tells."""

from collections.abc import Sequence as SequenceOf
from itertools import chain

import numpy as np

from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.known import PROMPT, KnownGroup, KnownResponse
from seer_jax.core.draft.messages import ExchangeReply, HeldGroup, TokenDelta
from seer_jax.core.draft.speculate import ADDRESS_FIELDS, DraftBatch, SpeculationArgs, batch_speculate, speculate
from seer_jax.core.sequence import Sequence


class DraftClient:
    """Drafts for the sequences of an instance from what their groups have said; not thread-safe.

    Grouped, it tells the draft server and learns from it: what the server replies to `updates()` and `held()` goes to
    `apply`. Messages may be lost, repeated or overtake each other. An update is sent until a reply says that the server
    has it, so there should be one exchange at a time, and what is lacking here is asked for until it comes.

    Args:
        args: How drafts are made.
        grouped: Whether siblings share an automaton; else each request drafts from itself (SuffixDecoding).
        ttl_seconds: How long a group is kept after a sequence of it was last observed.
        policy_version: Weights that say what is observed.

    Attributes:
        epoch: The policy version, which goes with updates.
    """

    def __init__(self, args: SpeculationArgs, *, grouped: bool, ttl_seconds: float, policy_version: int = 0) -> None:
        self.epoch = policy_version
        self._args, self._grouped, self._ttl_seconds = args, grouped, ttl_seconds
        self._groups: dict[tuple[int, ...], KnownGroup] = {}
        self._running: dict[Sequence, KnownResponse] = {}
        self._room = self._out = DraftBatch.empty(1, 1)

    def draft(
        self, sequences: SequenceOf[Sequence], budgets: np.ndarray, calibration: np.ndarray | None = None
    ) -> DraftBatch:
        """Draft for sequences that are ready to decode, after taking in what they have said.

        Args:
            sequences: B sequences.
            budgets: int32 [B]; draft tokens of each at most.
            calibration: See `batch_speculate`.

        Returns:
            Drafts, a row for each sequence; overwritten by the next call. Only the first `num_nodes` of a row mean
            anything, and there may be more columns than the largest budget.
        """
        responses = [self._take_in(sequence) for sequence in sequences]
        # Only now: taking in one response's tokens may move the arrays that its siblings' addresses point at.
        addresses = chain.from_iterable([response.address() for response in responses])
        places = np.fromiter(addresses, np.int64, len(responses) * ADDRESS_FIELDS).reshape(-1, ADDRESS_FIELDS)
        out = self._make_room(len(sequences), int(budgets.max(initial=1)))
        batch_speculate(places, budgets, self._args, out, calibration)
        return out

    def observe(self, sequence: Sequence) -> None:
        """Take in what a sequence has said since the last call, for its siblings; registers its group."""
        response = self._take_in(sequence)
        if sequence.finish_reason is not None:
            # It may go on elsewhere: from now on the server says what comes next.
            del self._running[sequence]
            response.sequence = None

    def updates(self) -> list[TokenDelta]:
        """What the sequences here have said that the server is not known to hold; one delta a request."""
        if not self._grouped:
            return []
        return [update for key, group in self._groups.items() for update in group.updates(key[0])]

    def held(self) -> list[HeldGroup]:
        """What is known of the registered groups."""
        return [group.held(key[0]) for key, group in self._groups.items()] if self._grouped else []

    def apply(self, reply: ExchangeReply) -> None:
        """Take in a reply of the server; nothing of it if it is of another epoch, or about groups not registered."""
        if reply.epoch != self.epoch or not self._grouped:
            return
        for request_id, num_held in reply.num_held.items():
            group = self._groups.get(request_id[:1])
            if group is not None and request_id.index in group.responses:
                group.responses[request_id.index].num_sent = group.num_prompt + num_held
        for delta in reply.deltas:
            group = self._groups.get(delta.request_id[:1])
            if group is not None:
                group.apply(delta)

    def expire(self, now: float) -> None:
        """Forget groups of which no sequence was observed for the time to live.

        One that is needed again is built from its sequences' tokens at once, from its siblings' with the next exchange.
        What was not sent by then the server asks for when the request says more, wherever that is.

        Args:
            now: Seconds of any clock that only goes forward. Observations count as made at the next call of this.
        """
        for key, group in list(self._groups.items()):
            if group.is_used:
                group.is_used, group.expires_at = False, now + self._ttl_seconds
            elif group.expires_at <= now:
                del self._groups[key]
                for response in group.responses.values():
                    self._running.pop(response.sequence, None)

    def clear(self, policy_version: int) -> None:
        """Forget all groups: new weights, of that version, say something else."""
        self.epoch = policy_version
        self._groups.clear()
        self._running.clear()

    def warmup(self) -> None:
        """Load or compile the loops."""
        automaton = SuffixAutomaton(self._args.pattern_lookup_max, capacity=1)
        automaton.open(PROMPT)
        for _ in range(2):  # By the second time the hash table is crowded, and grows.
            automaton.append(PROMPT, np.arange(8, dtype=np.int32))
        speculate(automaton, [PROMPT], 1, self._args)

    def _take_in(self, sequence: Sequence) -> KnownResponse:
        response = self._running.get(sequence) or self._start(sequence)
        response.group.is_used = True
        response.num_own = num_tokens = sequence.num_tokens
        if response.num_tokens < num_tokens:
            response.append(sequence.token_ids[response.num_tokens : num_tokens])
        return response

    def _start(self, sequence: Sequence) -> KnownResponse:
        """Follow a sequence that is new here."""
        request_id, num_prompt = sequence.chunk.request_id, sequence.chunk.num_prompt_tokens
        key = request_id[:1] if self._grouped else request_id
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = KnownGroup(sequence.token_ids[:num_prompt], self._args.pattern_lookup_max)
        response = group.responses.get(request_id.index)
        if response is None:
            # Earlier chunks were sent by the instances that ran them; if the server lacks any, it says so.
            response = KnownResponse(group, num_sent=len(sequence.chunk.token_ids))
            group.responses[request_id.index] = response
        elif response.num_tokens > sequence.num_tokens:
            # An instance got further and was lost. Its text stays: the same tokens are likely to come again.
            response.begin()
        response.sequence, response.token_ids = sequence, sequence.token_ids
        self._running[sequence] = response
        return response

    def _make_room(self, num_requests: int, max_nodes: int) -> DraftBatch:
        """The first rows of a batch that is used again and again."""
        rows, columns = self._room.token_ids.shape
        if num_requests > rows or max_nodes > columns:
            self._room = self._out = DraftBatch.empty(max(num_requests, rows), max(max_nodes, columns))
        if num_requests != len(self._out.num_nodes):
            self._out = DraftBatch(**{name: array[:num_requests] for name, array in vars(self._room).items()})
        return self._out
