"""The rollout driver: events in, commands out. Controller and simulator run this very object.

It is pure and deterministic: no clock, no randomness, no threads. The same events give the same commands, so a recorded
run replays (`seer_jax.core.eventlog`) and a crashed controller resumes (`snapshot`, `restore`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import assert_never

from seer_jax.core.buffer import RequestBuffer
from seer_jax.core.checks import check_chunk_result, check_groups
from seer_jax.core.commands import Command, EmitSample, IterationDone, StartChunk
from seer_jax.core.context import ContextManager, GroupMaxEstimator, LengthContext, LengthEstimator
from seer_jax.core.errors import InstanceLostError, ProtocolError
from seer_jax.core.events import ChunkFinished, Event, GroupsSubmitted, InstanceJoined, InstanceLost, InstanceReport
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.request import RequestState, RolloutRequest, split_groups
from seer_jax.core.scheduling.base import Decision, SchedulingPolicy
from seer_jax.core.types import InstanceStatus, RequestChunk


@dataclass(frozen=True, kw_only=True, eq=False)
class DriverSnapshot:
    """All state of a driver as plain data; picklable if the KV handles' `ref`s are.

    Attributes:
        policy_version: Weights of the current or last iteration; None before the first.
        waiting: Waiting requests in the buffer's order.
        running: Requests with a chunk at an instance.
        service_order: Groups with waiting requests, the longest without service first.
        num_decisions: Scheduling decisions of the iteration so far.
        lengths: What was learnt about lengths.
        loads: Live instances and what is in flight there.
        lost_instance_ids: Instances that are gone.
        reports: Latest telemetry by instance.
        firings: How often each option changed a decision of the iteration.
    """

    policy_version: int | None
    waiting: tuple[RolloutRequest, ...]
    running: tuple[RolloutRequest, ...]
    service_order: tuple[int, ...]
    num_decisions: int
    lengths: LengthContext
    loads: tuple[InstanceLoad, ...]
    lost_instance_ids: frozenset[int]
    reports: dict[int, InstanceStatus]
    firings: dict[str, int]


class RolloutDriver:
    """Runs the requests of one iteration after the other over the instances that are there.

    Args:
        policy: Which chunk goes where.
        estimator: How long requests will get; the paper's estimate by default.

    Invariants: every request is emitted exactly once with exactly the tokens that its chunks returned; at most one
    chunk of a request is in flight; the pages reserved at an instance never exceed what it has. An event that raises
    `ConfigError`, `CapacityError` or `ProtocolError` has changed nothing.
    """

    def __init__(self, policy: SchedulingPolicy, estimator: LengthEstimator | None = None) -> None:
        self._policy = policy
        self._estimator = estimator or GroupMaxEstimator()
        self._policy_version: int | None = None
        self._loads: dict[int, InstanceLoad] = {}
        self._lost_instance_ids: set[int] = set()
        self._firings: Counter[str] = Counter()
        self.buffer = RequestBuffer(ContextManager(estimator=self._estimator))
        self.reports: dict[int, InstanceStatus] = {}

    @property
    def loads(self) -> MappingProxyType[int, InstanceLoad]:
        """What is in flight at the live instances, for displays."""
        return MappingProxyType(self._loads)

    @property
    def firings(self) -> Mapping[str, int]:
        """How often each option changed a decision of the current or last iteration; 0 for one that never did."""
        return MappingProxyType(self._firings)

    def handle(self, event: Event) -> list[Command]:
        """Take note of what happened and say what to do about it.

        Args:
            event: Anything that happened; the order of events is the order of calls.

        Returns:
            Commands to carry out in order. `IterationDone` is always the last.

        Raises:
            ConfigError: Submitted groups are empty or too long for every instance.
            CapacityError: A submitted request can never fit in the pages of any instance.
            InstanceLostError: No instance can run what remains. The loss is booked: the driver goes on as soon as a new
                instance joins.
            ProtocolError: An event that contradicts what the driver knows: a bug of the sender.
        """
        match event:
            case InstanceJoined():
                return self._join(event)
            case InstanceLost():
                return self._lose(event)
            case GroupsSubmitted():
                return self._submit(event)
            case ChunkFinished():
                return self._finish_chunk(event)
            case InstanceReport():
                return self._report(event)
            case _:
                assert_never(event)

    def snapshot(self) -> DriverSnapshot:
        """Copy the whole state; later events do not change the copy."""
        return DriverSnapshot(
            policy_version=self._policy_version,
            waiting=tuple(request.copy() for request in self.buffer.waiting.values()),
            running=tuple(request.copy() for request in self.buffer.running.values()),
            service_order=self.buffer.service_order(),
            num_decisions=self.buffer.num_taken,
            lengths=self.buffer.context.lengths.copy(),
            loads=tuple(load.copy() for load in self._loads.values()),
            lost_instance_ids=frozenset(self._lost_instance_ids),
            reports=dict(self.reports),
            firings=dict(self._firings),
        )

    def restore(self, snapshot: DriverSnapshot) -> None:
        """Take over a snapshot's state; the same further events then give the same further commands.

        Chunks that were in flight still count as such: the caller lets them finish or reports their instance lost.
        Policy and estimator are the ones that this driver was made with.
        """
        self.buffer = RequestBuffer(ContextManager(estimator=self._estimator, lengths=snapshot.lengths.copy()))
        self.buffer.restore(
            waiting=[request.copy() for request in snapshot.waiting],
            running=[request.copy() for request in snapshot.running],
            service_order=snapshot.service_order,
            num_taken=snapshot.num_decisions,
        )
        self._policy_version = snapshot.policy_version
        self._loads = {load.info.instance_id: load.copy() for load in snapshot.loads}
        self._lost_instance_ids = set(snapshot.lost_instance_ids)
        self.reports = dict(snapshot.reports)
        self._firings = Counter(snapshot.firings)

    def _join(self, event: InstanceJoined) -> list[Command]:
        instance_id = event.info.instance_id
        if instance_id in self._loads or instance_id in self._lost_instance_ids:
            # A reused id would let late messages of the old instance pass for the new one's.
            raise ProtocolError(f"instance {instance_id} joined before; a replacement needs a new id")
        if self.buffer and event.policy_version != self._policy_version:
            raise ProtocolError(
                f"instance {instance_id} joined with policy version {event.policy_version} during an iteration of "
                f"version {self._policy_version}"
            )
        self._loads[instance_id] = InstanceLoad(info=event.info)
        return self._schedule()

    def _lose(self, event: InstanceLost) -> list[Command]:
        if event.instance_id in self._lost_instance_ids:
            return []  # Heartbeat and failed call may both report one death.
        self._require_instance(event.instance_id)
        load = self._loads.pop(event.instance_id)
        self._lost_instance_ids.add(event.instance_id)
        self.reports.pop(event.instance_id, None)
        for request in sorted((self.buffer.running[i] for i in load.in_flight), key=lambda r: r.arrival):
            self.buffer.put(request)
        unfinished = (*self.buffer.waiting.values(), *self.buffer.running.values())
        longest = max((request.max_total_tokens for request in unfinished), default=0)
        if longest > max((other.max_request_tokens for other in self._loads.values()), default=0):
            raise InstanceLostError(
                f"instance {event.instance_id} is lost; none of the {len(self._loads)} left can hold a request of "
                f"{longest} tokens; {len(self.buffer)} requests remain"
            )
        return self._schedule()

    def _submit(self, event: GroupsSubmitted) -> list[Command]:
        if self.buffer:
            raise ProtocolError(f"groups submitted while {len(self.buffer)} requests are unfinished")
        if self._policy_version is not None and event.policy_version < self._policy_version:
            raise ProtocolError(f"policy version {event.policy_version} after {self._policy_version}")
        check_groups(event.groups, list(self._loads.values()))
        self._policy_version = event.policy_version
        self._firings.clear()
        self.buffer = RequestBuffer(ContextManager(estimator=self._estimator))
        for request in split_groups(event.groups):
            self.buffer.put(request)
        return self._schedule()

    def _finish_chunk(self, event: ChunkFinished) -> list[Command]:
        if event.instance_id in self._lost_instance_ids:
            return []  # The chunk runs again elsewhere, with the same tokens.
        self._require_instance(event.instance_id)
        load = self._loads[event.instance_id]
        request = self.buffer.running.get(event.request_id)
        chunk = load.in_flight.get(event.request_id)
        if request is None or chunk is None:
            raise ProtocolError(f"no chunk of {event.request_id} is in flight at instance {event.instance_id}")
        check_chunk_result(event, chunk, request)
        load.remove(event.request_id)
        request.append(event.token_ids, event.logprobs, event.expert_ids)
        request.kv = event.kv
        if event.finish_reason == "chunk":
            self.buffer.put(request)
            return self._schedule()
        request.finish_reason = event.finish_reason
        request.kv = None
        self.buffer.finish(request)
        commands: list[Command] = [EmitSample(sample=request.to_sample(chunk.policy_version)), *self._schedule()]
        if not self.buffer:
            commands.append(IterationDone())
        return commands

    def _report(self, event: InstanceReport) -> list[Command]:
        instance_id = event.status.instance_id
        if instance_id not in self._lost_instance_ids:
            self._require_instance(instance_id)
            self.reports[instance_id] = event.status
        return []

    def _schedule(self) -> list[Command]:
        commands: list[Command] = []
        while (decision := self._policy.decide(self.buffer, self._loads)) is not None:
            if decision.fired:
                self._firings.update(decision.fired)
            commands.append(self._start(decision))
        return commands

    def _start(self, decision: Decision) -> StartChunk:
        request = decision.request
        assert request.state is RequestState.WAITING and self._policy_version is not None
        kv = request.kv if request.kv is not None and request.kv.policy_version == self._policy_version else None
        chunk = RequestChunk(
            request_id=request.request_id,
            chunk_index=request.num_chunks,
            token_ids=request.token_ids(),
            num_prompt_tokens=request.num_prompt_tokens,
            max_chunk_tokens=decision.max_chunk_tokens,
            max_total_tokens=request.max_total_tokens,
            num_reserved_pages=decision.num_reserved_pages,
            num_shared_pages=decision.num_shared_pages,
            policy_version=self._policy_version,
            priority=decision.priority,
            sampling=request.group.sampling,
            sampling_key=request.sampling_key,
            kv=kv,
        )
        self.buffer.take(request)
        request.num_chunks += 1
        request.instance_id = decision.instance_id
        self._loads[decision.instance_id].add(chunk)
        return StartChunk(instance_id=decision.instance_id, chunk=chunk)

    def _require_instance(self, instance_id: int) -> None:
        if instance_id not in self._loads:
            raise ProtocolError(f"instance {instance_id} has not joined")
