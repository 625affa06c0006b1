"""Messages may be lost, late and doubled: every chunk is taken once, every event heard once."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from seer_jax.core.events import ChunkFinished, InstanceReport
from seer_jax.core.types import InstanceStatus
from seer_jax.distributed.mailbox import Mailbox, Outbox
from tests.core.fake_cluster import finish
from tests.engine import tiny


class Instance:
    """Finishes every chunk that it has taken at the next poll, and reports."""

    def __init__(self) -> None:
        self.taken, self.open = [], []
        self.mailbox = Mailbox(self._take, self._collect)

    def _take(self, chunk):
        self.taken.append(chunk.request_id.index)
        self.open.append(chunk)

    def _collect(self):
        finished = [finish(0, chunk, 1000) for chunk in self.open]
        self.open = []
        return [
            *finished,
            InstanceReport(
                status=InstanceStatus(instance_id=0, num_running=0, num_waiting=0, num_free_pages=1, num_total_pages=1)
            ),
        ]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.7]))
def test_every_chunk_is_taken_once_and_every_event_heard_once(seed, loss):
    rng, instance, outbox = random.Random(seed), Instance(), Outbox()
    numbers, late, polls, heard, num_sent = itertools.count(), [], [], [], 0
    while num_sent < 20 or outbox.num_in_flight:
        if num_sent < 20 and rng.random() < 0.5:
            size = rng.randint(1, 3)
            message = outbox.add([tiny.chunk(tiny.prompt(0, 4), index=next(numbers)) for _ in range(size)])
            num_sent += size
            late += [message] * rng.choice([0, 1, 1, 2])  # Lost, on its way, or doubled.
        rng.shuffle(late)
        if late and rng.random() < 0.5:
            instance.mailbox.receive(late.pop())
        number, batches = outbox.next_poll()
        if rng.random() < loss:
            polls.append((number, batches))
            continue  # The poll is lost, or late.
        if polls and rng.random() < 0.3:
            instance.mailbox.poll(*polls.pop(0))  # Its answer finds nobody waiting.
        answer = instance.mailbox.poll(number, batches)
        if rng.random() < loss:
            continue  # Its answer is.
        heard += [e.request_id.index for e in outbox.open(answer) if isinstance(e, ChunkFinished)]
    for message in late:
        instance.mailbox.receive(message)
    assert sorted(instance.taken) == sorted(heard) == list(range(num_sent))


def test_a_repeated_poll_does_not_wait_for_new_events_and_takes_new_chunks():
    instance, outbox = Instance(), Outbox()
    outbox.add([tiny.chunk(tiny.prompt(0, 4), index=0)])
    first = instance.mailbox.poll(*outbox.next_poll())
    outbox.add([tiny.chunk(tiny.prompt(0, 4), index=1)])
    again = instance.mailbox.poll(*outbox.next_poll())
    assert again.events == first.events and first.receipts == (1,) and again.receipts == (1, 2)
    assert instance.taken == [0, 1]
    outbox.open(again)
    assert outbox.next_poll() == (2, {}) and outbox.num_in_flight == 1
