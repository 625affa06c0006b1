"""The draft server (Seer, section 3, DGDS): collects what all requests of a group have said, for all instances.

It keeps token logs only, 4 bytes a token; clients build their automata themselves, so that no tree travels. Losing the
server costs acceptance, never a wrong token.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from seer_jax.core.draft.messages import FIRST_REMEMBERED, ExchangeReply, HeldGroup, TokenDelta
from seer_jax.core.types import RequestId, TokenIds


class TokenLog:
    """Tokens of one response; only grows, in amortised constant time.

    Attributes:
        num_tokens: Tokens so far.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._array = np.empty(0, np.int32)

    def append(self, token_ids: TokenIds) -> None:
        """Append int32 tokens."""
        end = self.num_tokens + len(token_ids)
        if end > len(self._array):
            # A new array: slices of the old one may still be on their way to a client.
            longer = np.empty(max(end, 2 * len(self._array)), np.int32)
            longer[: self.num_tokens] = self.since(0)
            self._array = longer
        self._array[self.num_tokens : end] = token_ids
        self.num_tokens = end

    def since(self, count: int) -> TokenIds:
        """The tokens after the first `count`, not copied: what is written never changes."""
        return self._array[count : self.num_tokens]


class DraftServer:
    """Token logs of one epoch, by group and request; not thread-safe.

    Updates are idempotent: what is known already is trimmed, what does not join on is refused, and the count held tells
    the sender where to go on. Of tokens said twice, as when a lost chunk runs again elsewhere, the first stay.

    Args:
        policy_version: The first epoch.
        memory_tokens: Tokens of responses to remember over epochs, for prompts that come again; 0 = none. Prompts are
            remembered whole or not at all. It does not matter that the weights that said them are gone: verification
            keeps any draft exact.

    Attributes:
        epoch: Policy version of the responses.
    """

    def __init__(self, policy_version: int = 0, *, memory_tokens: int = 0) -> None:
        self.epoch = policy_version
        self._memory_tokens = memory_tokens
        self._logs: dict[int, dict[int, TokenLog]] = {}
        self._prompt_keys: dict[int, bytes] = {}
        # Prompts in the order of the last epoch with them.
        self._memory: dict[bytes, list[TokenIds]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of this epoch."""
        return sum(log.num_tokens for group in self._logs.values() for log in group.values())

    @property
    def num_remembered_tokens(self) -> int:
        """Tokens of earlier epochs, at most `memory_tokens`."""
        return sum(map(_count_tokens, self._memory.values()))

    def start_epoch(self, policy_version: int) -> None:
        """Forget the responses, but for those to remember; messages of other epochs are of no use any more."""
        if self._memory_tokens:
            self._remember()
        self._logs.clear()
        self._prompt_keys.clear()
        self.epoch = policy_version

    def update_cst(self, request_id: RequestId, prev_token_count: int, new_tokens: TokenIds) -> int:
        """Take in tokens of a request.

        Args:
            request_id: The request.
            prev_token_count: Its generated tokens before these.
            new_tokens: int32 [count].

        Returns:
            Tokens of the request held now; fewer than `prev_token_count` if they were refused for a gap.
        """
        requests = self._logs.setdefault(request_id.group_id, {})
        log = requests.setdefault(request_id.index, TokenLog())
        if prev_token_count <= log.num_tokens:
            log.append(new_tokens[log.num_tokens - prev_token_count :])
        return log.num_tokens

    def fetch_cst(self, held: Sequence[HeldGroup]) -> list[TokenDelta]:
        """What clients lack of their groups.

        Args:
            held: The groups, with what is held of them already.

        Returns:
            Deltas that join on to what is held, at most one for each request.
        """
        return [
            TokenDelta(request_id=RequestId(group.group_id, index), prev_token_count=count, token_ids=token_ids[count:])
            for group in held
            for index, token_ids in self._responses_to(group)
            if (count := group.num_held.get(index, 0)) < len(token_ids)
        ]

    def exchange(self, epoch: int, updates: Sequence[TokenDelta], held: Sequence[HeldGroup]) -> ExchangeReply:
        """Take updates and give what is missing in one message: a remote call costs more than its content.

        Args:
            epoch: Policy version that the updates come from; any but the current is ignored and answered with nothing.
            updates: What the sender's requests have said.
            held: What the sender holds of its groups.
        """
        if epoch != self.epoch:
            return ExchangeReply(epoch=self.epoch, num_held={})
        num_held = {u.request_id: self.update_cst(u.request_id, u.prev_token_count, u.token_ids) for u in updates}
        if self._memory_tokens:
            self._prompt_keys |= {group.group_id: group.prompt_key for group in held}
        return ExchangeReply(epoch=self.epoch, deltas=self.fetch_cst(held), num_held=num_held)

    def _responses_to(self, group: HeldGroup) -> Iterator[tuple[int, TokenIds]]:
        for index, log in self._logs.get(group.group_id, {}).items():
            yield index, log.since(0)
        for i, token_ids in enumerate(self._memory.get(group.prompt_key, ())):
            yield FIRST_REMEMBERED - i, token_ids

    def _remember(self) -> None:
        """Replace what is remembered of the prompts of this epoch, and forget the prompts not seen for longest."""
        responses: dict[bytes, list[TokenIds]] = {}
        for group_id, key in self._prompt_keys.items():
            responses.setdefault(key, []).extend(_copies(self._logs.get(group_id, {})))
        for key, said in responses.items():
            if said:
                self._memory.pop(key, None)
                self._memory[key] = said
        num_tokens = self.num_remembered_tokens
        while num_tokens > self._memory_tokens:
            num_tokens -= _count_tokens(self._memory.pop(next(iter(self._memory))))


def _copies(logs: Mapping[int, TokenLog]) -> list[TokenIds]:
    """The responses without the spare room of their logs."""
    return [log.since(0).copy() for log in logs.values() if log.num_tokens]


def _count_tokens(responses: Sequence[TokenIds]) -> int:
    return sum(map(len, responses))
