"""A cluster without engines: chunks take random times, responses have given lengths, instances die at random."""

import functools
import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from seer_jax.core.commands import Command, EmitSample, IterationDone, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import ChunkFinished, Event, GroupsSubmitted, InstanceJoined, InstanceLost
from seer_jax.core.types import (
    InstanceInfo,
    KVHandle,
    RequestChunk,
    RequestId,
    RolloutGroup,
    Sample,
    SamplingParams,
)

property_settings = functools.partial(settings, derandomize=True, deadline=None)
"""Settings of a property test: the same examples in every run."""

Observer = Callable[[Event, Sequence[Command]], None]


def make_info(instance_id: int, **changes: int) -> InstanceInfo:
    """An instance of 8 pages of 4 tokens and 2 slots."""
    settings = {"num_total_pages": 8, "page_size": 4, "max_num_seqs": 2, "max_model_len": 32} | changes
    return InstanceInfo(instance_id=instance_id, **settings)


def make_group(group_id: int, *, size: int = 2, prompt: int = 4, max_tokens: int = 12) -> RolloutGroup:
    """A group whose prompt differs from the others'."""
    return RolloutGroup(
        group_id=group_id,
        prompt_token_ids=np.arange(prompt, dtype=np.int32) + 1000 * group_id,
        group_size=size,
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def capacity(info: InstanceInfo) -> int:
    """Tokens of the longest request that an instance can run to its limit."""
    return min(info.max_model_len, info.num_total_pages * info.page_size)


def response(request_id: RequestId, length: int) -> np.ndarray:
    """The tokens of a request: a function of request and position alone, as in the real engine."""
    return (np.arange(length, dtype=np.int32) * 31 + request_id.group_id * 7919 + request_id.index * 101) % 50021


def finish(instance_id: int, chunk: RequestChunk, true_length: int, *, kv: bool = True) -> ChunkFinished:
    """The result of a chunk of a request that will generate `true_length` tokens."""
    start = len(chunk.token_ids) - chunk.num_prompt_tokens
    end = min(start + chunk.max_chunk_tokens, true_length)
    reason = "chunk" if end < true_length else "stop"
    if chunk.num_prompt_tokens + end == chunk.max_total_tokens:
        reason = "length"
    tokens = response(chunk.request_id, end)[start:]
    handle = KVHandle(
        num_tokens=chunk.num_prompt_tokens + end - 1, policy_version=chunk.policy_version, ref="somewhere"
    )
    return ChunkFinished(
        instance_id=instance_id,
        request_id=chunk.request_id,
        chunk_index=chunk.chunk_index,
        token_ids=tokens,
        logprobs=-tokens.astype(np.float32) / 7,
        finish_reason=reason,
        policy_version=chunk.policy_version,
        kv=handle if kv and reason == "chunk" else None,
    )


@dataclass(kw_only=True)
class FakeCluster:
    """Runs a driver's commands in a random but seeded order and checks each of them.

    Attributes:
        infos: The instances at the start; some lost ones are replaced under new ids, the largest always.
        true_lengths: Generated tokens of every request.
        loss_rate: Chance that an instance dies when a chunk would end there.
        max_queued: Chunks that an instance takes beyond its slots; None = any number.
        observers: Called with every event and the commands it caused.
    """

    driver: RolloutDriver
    infos: Sequence[InstanceInfo]
    true_lengths: Mapping[RequestId, int]
    seed: int
    loss_rate: float = 0.0
    max_queued: int | None = None
    observers: list[Observer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    num_losses: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._live: dict[int, InstanceInfo] = {}
        self._in_flight: dict[tuple[int, RequestId], RequestChunk] = {}
        self._queue: list[tuple[float, int, int, RequestChunk]] = []
        self._num_sent = 0
        self._now = 0.0
        self._is_done = True
        for info in self.infos:
            self._join(info, policy_version=0)

    def run(self, groups: Sequence[RolloutGroup], *, policy_version: int = 0) -> list[Sample]:
        """Run one iteration; returns its samples in the order of completion."""
        first, self._is_done = len(self.samples), False
        self._send(GroupsSubmitted(groups=tuple(groups), policy_version=policy_version))
        while not self._is_done:
            self._now, _, instance_id, chunk = heapq.heappop(self._queue)
            if instance_id in self._live and self._rng.random() < self.loss_rate:
                self._lose(instance_id, policy_version)
            # A result of an instance that is lost by now arrives all the same, late.
            self._in_flight.pop((instance_id, chunk.request_id), None)
            has_kv = self._rng.random() < 0.8
            self._send(finish(instance_id, chunk, self.true_lengths[chunk.request_id], kv=has_kv))
        return self.samples[first:]

    def _join(self, info: InstanceInfo, policy_version: int) -> None:
        self._live[info.instance_id] = info
        self._send(InstanceJoined(info=info, policy_version=policy_version))

    def _lose(self, instance_id: int, policy_version: int) -> None:
        info = self._live[instance_id]
        self.num_losses += 1
        if self._rng.random() < 0.5 or info == max(self._live.values(), key=capacity):
            self._join(replace(info, instance_id=1000 + self.num_losses), policy_version)
        del self._live[instance_id]
        for key in [key for key in self._in_flight if key[0] == instance_id]:
            del self._in_flight[key]
        self._send(InstanceLost(instance_id=instance_id))

    def _send(self, event: Event) -> None:
        commands = self.driver.handle(event)
        for command in commands:
            assert not self._is_done, "a command after IterationDone or before the groups"
            match command:
                case StartChunk():
                    self._start(command.instance_id, command.chunk)
                case EmitSample():
                    self.samples.append(command.sample)
                case IterationDone():
                    self._is_done = True
        for observer in self.observers:
            observer(event, commands)

    def _start(self, instance_id: int, chunk: RequestChunk) -> None:
        info = self._live[instance_id]
        assert all(key[1] != chunk.request_id for key in self._in_flight), "a request runs twice at a time"
        generated = chunk.token_ids[chunk.num_prompt_tokens :]
        np.testing.assert_array_equal(generated, response(chunk.request_id, len(generated)))
        last_token = len(chunk.token_ids) + chunk.max_chunk_tokens
        assert chunk.max_chunk_tokens >= 1 and last_token <= chunk.max_total_tokens
        if chunk.num_reserved_pages:
            assert chunk.num_reserved_pages * info.page_size >= last_token, "the reservation does not hold the chunk"
        self._in_flight[instance_id, chunk.request_id] = chunk
        here = [other for key, other in self._in_flight.items() if key[0] == instance_id]
        queued = self.driver.loads[instance_id].queued
        running = [other for other in here if other.request_id not in queued]
        own = sum(other.num_reserved_pages - other.num_shared_pages for other in running)
        prompts = {other.request_id.group_id: other.num_shared_pages for other in running if other.num_reserved_pages}
        if chunk.num_reserved_pages:
            assert chunk.num_shared_pages * info.page_size < chunk.num_prompt_tokens
            assert own + sum(prompts.values()) <= info.num_total_pages, "pages reserved twice"
        assert len(running) <= info.max_num_seqs, "slots given twice"
        assert self.max_queued is None or len(queued) <= self.max_queued
        self._num_sent += 1
        heapq.heappush(self._queue, (self._now + self._rng.expovariate(1.0), self._num_sent, instance_id, chunk))


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """An iteration to run. Instances and groups are built on demand, outside of hypothesis' drawing.

    Attributes:
        instances: (pages, slots, max_model_len) of each.
        responses: (prompt length, limit, true lengths) of each group.
    """

    page_size: int
    instances: list[tuple[int, int, int]]
    responses: list[tuple[int, int, list[int]]]
    chunk_size: int
    starvation_interval: int
    prefetch_chunks: int
    seed: int

    @functools.cached_property
    def infos(self) -> list[InstanceInfo]:
        """The instances; the first can hold every request."""
        return [
            make_info(
                number, num_total_pages=pages, page_size=self.page_size, max_num_seqs=slots, max_model_len=max_model_len
            )
            for number, (pages, slots, max_model_len) in enumerate(self.instances)
        ]

    @functools.cached_property
    def groups(self) -> list[RolloutGroup]:
        """The prompt groups."""
        return [
            make_group(100 + 3 * number, size=len(lengths), prompt=prompt, max_tokens=limit)
            for number, (prompt, limit, lengths) in enumerate(self.responses)
        ]

    @functools.cached_property
    def true_lengths(self) -> dict[RequestId, int]:
        """Generated tokens of every request."""
        return {
            RequestId(group.group_id, index): length
            for group, (_, _, lengths) in zip(self.groups, self.responses, strict=True)
            for index, length in enumerate(lengths)
        }


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small iterations of every kind: tight or ample pages, instances some of which are too small for some requests."""
    responses = []
    for _ in range(draw(st.integers(1, 6))):
        limit = draw(st.integers(1, 30))
        lengths = draw(st.lists(st.integers(1, limit), min_size=1, max_size=5))
        responses.append((draw(st.integers(1, 9)), limit, lengths))
    page_size = draw(st.sampled_from([1, 4, 16]))
    longest = max(prompt + limit for prompt, limit, _ in responses)
    enough = -(-longest // page_size)
    instances = []
    for number in range(draw(st.integers(1, 4))):
        pages = draw(st.integers(1 if number else enough, 5 * enough))
        max_model_len = draw(st.integers(2 if number else longest, longest + 5))
        instances.append((pages, draw(st.integers(1, 4)), max_model_len))
    return Scenario(
        page_size=page_size,
        instances=instances,
        responses=responses,
        chunk_size=draw(st.integers(1, 16)),
        starvation_interval=draw(st.sampled_from([0, 1, 2, 5])),
        prefetch_chunks=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**32)),
    )


def expected_responses(scenario: Scenario) -> dict[RequestId, list[int]]:
    """What every request must return in the end."""
    return {name: response(name, length).tolist() for name, length in scenario.true_lengths.items()}
