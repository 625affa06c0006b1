"""Messages between controller and instance that may be lost, late or doubled, and still count once.

The controller numbers the batches of chunks that it sends and repeats, with every poll, those that it has no receipt
for. It numbers polls too; one whose answer was lost is sent again under its number and gets the same answer.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from seer_jax.core.events import ChunkFinished, Event
from seer_jax.core.types import RequestChunk

Batches = Mapping[int, Sequence[RequestChunk]]
"""Chunks by the number of their message."""


class Answer(NamedTuple):
    """What a poll returns.

    Attributes:
        events: What happened, in order.
        receipts: The numbers that came with the poll.
    """

    events: list[Event]
    receipts: tuple[int, ...]


class Mailbox:
    """An instance's end; its methods may be called from several threads."""

    def __init__(self, take: Callable[[RequestChunk], None], collect: Callable[[], list[Event]]) -> None:
        """Start with nothing received.

        Args:
            take: Called once with each chunk.
            collect: Waits for events and hands them over; called once per numbered poll.
        """
        self._take, self._collect = take, collect
        self._received: set[int] = set()
        self._receiving, self._answering = threading.Lock(), threading.Lock()
        self._last_poll, self._answer = 0, Answer([], ())

    def receive(self, batches: Batches) -> None:
        """Take the chunks of messages that did not come before."""
        with self._receiving:
            new = [number for number in batches if number not in self._received]
            self._received.update(new)
        for number in new:
            for chunk in batches[number]:
                self._take(chunk)

    def poll(self, number: int, batches: Batches) -> Answer:
        """Receive, then answer; again with the same answer if the number is that of the last poll.

        Args:
            number: One more than the last poll's; the last poll's again; or, if it comes late, an older one, which
                nobody waits for any more.
            batches: All messages that the controller has no receipt for.
        """
        self.receive(batches)
        with self._answering:
            if number < self._last_poll:
                return Answer([], ())
            if number > self._last_poll:
                self._answer = Answer(self._collect(), ())
                self._last_poll = number
            return self._answer._replace(receipts=tuple(batches))


class Outbox:
    """The controller's end for one instance: what to send, and what is not answered yet.

    Attributes:
        num_in_flight: Chunks sent whose end was not heard of.
    """

    def __init__(self) -> None:
        self.num_in_flight = 0
        self._num_batches, self._num_polls = 0, 0
        self._unreceipted: dict[int, Sequence[RequestChunk]] = {}
        self._is_polling = False

    def add(self, chunks: Sequence[RequestChunk]) -> Batches:
        """Number a message; it is repeated until there is a receipt."""
        self._num_batches += 1
        self._unreceipted[self._num_batches] = chunks
        self.num_in_flight += len(chunks)
        return {self._num_batches: chunks}

    def next_poll(self) -> tuple[int, Batches]:
        """Arguments of the next poll; the same number until `open` took its answer."""
        if not self._is_polling:
            self._num_polls += 1
            self._is_polling = True
        return self._num_polls, dict(self._unreceipted)

    def open(self, answer: Answer) -> list[Event]:
        """Take in the answer of the poll under way; returns its events."""
        self._is_polling = False
        for number in answer.receipts:
            self._unreceipted.pop(number, None)
        self.num_in_flight -= sum(isinstance(event, ChunkFinished) for event in answer.events)
        return answer.events
