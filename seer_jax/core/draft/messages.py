"""What instances and the draft server tell each other: token deltas, never trees.

A token costs 4 bytes; a tree of it ten times that. All counts are of generated tokens, the prompt is not among them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seer_jax.core.types import RequestId, TokenIds

FIRST_REMEMBERED = -2
"""Index of the first response that the server remembers of an earlier epoch; the next ones are -3, -4, ..."""
WANTS_NOTHING = 2**31 - 1
"""Count that a client gives for a request whose sequence runs on its own instance, which knows its tokens first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDelta:
    """Tokens of one response from a position on.

    Attributes:
        request_id: The request; a negative index is a response remembered from an earlier epoch.
        prev_token_count: Tokens of the response before these.
        token_ids: int32 [count].
    """

    request_id: RequestId
    prev_token_count: int
    token_ids: TokenIds


@dataclass(frozen=True, kw_only=True)
class HeldGroup:
    """What a client holds of a group that is registered with it, so that only the rest is sent.

    Attributes:
        group_id: The group.
        num_held: Tokens held, by request index; none of requests that are not listed.
        prompt_key: `prompt_key` of its prompt, by which the server finds responses of earlier epochs.
    """

    group_id: int
    num_held: Mapping[int, int]
    prompt_key: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangeReply:
    """The server's answer to updates and held groups.

    Attributes:
        epoch: The server's epoch; the reply is empty if the message was of another one.
        deltas: What the client lacks of its groups.
        num_held: Tokens that the server now has of each request with an update; the client goes on from there. An
            update that starts later was refused for the gap.
    """

    epoch: int
    deltas: Sequence[TokenDelta] = ()
    num_held: Mapping[RequestId, int]


def prompt_key(token_ids: TokenIds) -> bytes:
    """16 bytes that name a prompt in all epochs, whatever the group is called."""
    return hashlib.blake2b(np.asarray(token_ids, "<i4").tobytes(), digest_size=16).digest()
