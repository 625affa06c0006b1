"""What an instance knows of a group: its automaton, and how far each response in it reaches.

Counts include the prompt here; those in messages do not.
"""

from math import inf

import numpy as np

from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.messages import WANTS_NOTHING, HeldGroup, TokenDelta, prompt_key
from seer_jax.core.draft.speculate import ADDRESS_FIELDS, address_of
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestId, TokenIds

PROMPT = -1
"""Name of the prompt among the texts of an automaton; responses are numbered from 0."""


class KnownResponse:
    """A response in the automaton of its group.

    Attributes:
        group: Its group.
        num_tokens: Tokens of it in the automaton.
        sequence: The sequence that runs here, which alone says what comes next; None if it has left or never was here.
        token_ids: Tokens of its last sequence here, to send to the server. The sequence's own array, which only changes
            past `num_own`, so keeping it costs no copy.
        num_own: How many of them are known; the automaton may know more from the server.
        num_sent: Tokens that the server holds, as far as is known.
    """

    __slots__ = ("_address", "_name", "_version", "group", "num_own", "num_sent", "num_tokens", "sequence", "token_ids")

    def __init__(self, group: "KnownGroup", num_sent: int) -> None:
        self.group, self.num_sent = group, num_sent
        self.sequence: Sequence | None = None
        self.token_ids, self.num_own = np.empty(0, np.int32), 0
        self.begin()

    def begin(self) -> None:
        """Become a new text, of the prompt only; an earlier one stays in the automaton without a name."""
        self._name, self.num_tokens = self.group.open_text(), self.group.num_prompt
        self._address, self._version = (0,) * ADDRESS_FIELDS, -1

    def append(self, token_ids: TokenIds) -> None:
        """Append int32 tokens to the text."""
        self.group.automaton.append(self._name, token_ids)
        self.num_tokens += len(token_ids)
        self.group.note_arrays()

    def address(self) -> tuple[int, ...]:
        """`address_of` the text; holds until anything is appended to the group."""
        if self._version != self.group.version:
            self._address, self._version = address_of(self.group.automaton, self._name), self.group.version
        return self._address


class KnownGroup:
    """A registered group, or a request on its own.

    Args:
        prompt: int32 [tokens].
        max_context: Longest context, in tokens, that drafts look up.

    Attributes:
        num_prompt: Tokens of the prompt.
        responses: By request index, see `TokenDelta`.
        version: Counts the times that the automaton's arrays moved.
        is_used: Whether a sequence was observed since the time to live was last looked at.
        expires_at: Time in seconds at which the group is forgotten unless it is used.
    """

    def __init__(self, prompt: TokenIds, max_context: int) -> None:
        self.num_prompt = len(prompt)
        self.automaton = SuffixAutomaton(max_context)
        self.automaton.open(PROMPT)
        self.automaton.append(PROMPT, prompt)
        self.responses: dict[int, KnownResponse] = {}
        self.version, self.is_used, self.expires_at = 0, True, inf
        self._prompt_key = prompt_key(prompt)
        self._num_texts = 0
        self._states, self._edges, self._cursors = (prompt,) * 3

    def open_text(self) -> int:
        """Start a text of the prompt only; returns its name."""
        name, self._num_texts = self._num_texts, self._num_texts + 1
        self.automaton.open(name, like=PROMPT)
        self.note_arrays()
        return name

    def note_arrays(self) -> None:
        """Note whether the automaton's arrays moved."""
        now = self.automaton
        if now.states is not self._states or now.edges is not self._edges or now.cursors is not self._cursors:
            self._states, self._edges, self._cursors = now.states, now.edges, now.cursors
            self.version += 1

    def updates(self, group_id: int) -> list[TokenDelta]:
        """What sequences here have said that the server is not known to hold."""
        return [
            TokenDelta(
                request_id=RequestId(group_id, index),
                prev_token_count=response.num_sent - self.num_prompt,
                token_ids=response.token_ids[response.num_sent : response.num_own],
            )
            for index, response in self.responses.items()
            if response.num_sent < response.num_own
        ]

    def held(self, group_id: int) -> HeldGroup:
        """What need not be sent here."""
        num_held = {
            index: response.num_tokens - self.num_prompt if response.sequence is None else WANTS_NOTHING
            for index, response in self.responses.items()
        }
        return HeldGroup(group_id=group_id, num_held=num_held, prompt_key=self._prompt_key)

    def apply(self, delta: TokenDelta) -> None:
        """Take in tokens that the server sent: what is known is trimmed, after a gap nothing is taken."""
        index = delta.request_id.index
        response = self.responses.get(index)
        if response is None:
            response = self.responses[index] = KnownResponse(self, num_sent=self.num_prompt)
        start = self.num_prompt + delta.prev_token_count
        end = start + len(delta.token_ids)
        response.num_sent = max(response.num_sent, end)
        if response.sequence is None and start <= response.num_tokens < end:
            # Copied: what another process sent is read-only, and the loops would be compiled for that in mid-rollout.
            response.append(np.array(delta.token_ids[response.num_tokens - start :], np.int32))
