"""Runs one iteration's rollout: feeds events to the driver and its commands to the cluster."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from seer_jax.config.schema import ChaosConfig
from seer_jax.core.chaos import Chaos
from seer_jax.core.commands import Command, EmitSample, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import InstanceLostError, ProtocolError
from seer_jax.core.eventlog import replay
from seer_jax.core.events import Event, GroupsSubmitted, InstanceJoined, InstanceLost, InstanceReport
from seer_jax.core.types import InstanceStatus, RequestChunk, RolloutGroup, Sample, output_sha256, tail_time_s
from seer_jax.engine.cluster import Cluster
from seer_jax.engine.engine import NO_CHAOS
from seer_jax.kvpool import PoolStats


@dataclass(frozen=True, kw_only=True)
class RolloutStats:
    """Figures of one rollout; times in seconds from the submission of the groups.

    Attributes:
        tail_time_s: From the end of the 90th percentile request to the end of the rollout.
        prefilled_tokens: Tokens whose KV was computed in prefill slices.
        re_prefilled_tokens: Those of them whose KV had existed before and was lost.
        shared_tokens: Prompt tokens whose KV was copied from a sibling instead.
        mean_acceptance_length: Tokens emitted per verification, empty drafts included; 1 without speculation.
        num_steps: Model steps, all instances together.
        draft_time_s: Host time of drafting, all instances together, part of the host's share.
        verify_time_s: Device time of verification, all instances together.
        imported_tokens: Tokens of resumed chunks whose KV came from the host or from another instance.
        max_kv_utilization: Highest share of pages in use at any instance, those of paused requests aside.
        blocks_corrupt: KV blocks that came damaged out of the pool; like lost ones they cost a re-prefill.
        blocks_lost: KV blocks that the pool had no room for, or gave up for others.
        spilled_bytes: KV that the pool wrote to disk.
        kv_wait_s: Time engines waited for KV from the pool, all instances together.
        saved_bytes: KV sent to pools.
        moves_declined: Times that KV in a pool was computed again because that was measured to be faster.
        pool_peak_bytes: Most memory in use by pools, summed over them, since they were opened.
        pool_owners_lost: Owners of shared pools that died, with what they held.
        messages_dropped: Messages to and from instances that `chaos.drop_message` took; they were sent again.
        instances_lost: Instances that died, hung or were killed.
        chunks_resumed: Chunks that were under way there, and run again elsewhere from the last returned token.
        replayed_events: Events of a process that died, by which the rollout went on.
    """

    num_requests: int
    generated_tokens: int
    rollout_time_s: float
    tokens_per_s: float
    tail_time_s: float
    num_preemptions: int
    num_chunks: int
    prefilled_tokens: int
    re_prefilled_tokens: int
    shared_tokens: int
    imported_tokens: int
    max_kv_utilization: float
    host_time_share: float
    num_steps: int
    drafted_tokens: int
    accepted_tokens: int
    mean_acceptance_length: float
    draft_time_s: float
    verify_time_s: float
    blocks_corrupt: int
    blocks_lost: int
    spilled_bytes: int
    kv_wait_s: float
    saved_bytes: int
    moves_declined: int
    pool_peak_bytes: int
    pool_owners_lost: int
    messages_dropped: int
    instances_lost: int
    chunks_resumed: int
    replayed_events: int
    output_sha256: str


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """All samples of an iteration, ordered by request, and the figures.

    Attributes:
        weights_update_s: Time to give the instances the weights; 0 if they had them.
    """

    samples: list[Sample]
    stats: RolloutStats
    weights_update_s: float


class RolloutRunner:
    """Owns the driver of a cluster over all iterations."""

    def __init__(
        self,
        cluster: Cluster,
        driver: RolloutDriver,
        *,
        policy_version: int = 0,
        on_event: Callable[[float, Event, Sequence[Command]], None] | None = None,
        chaos: ChaosConfig = NO_CHAOS,
        history: Iterable[Event] = (),
    ) -> None:
        """Take over instances; the first `run` joins them to the driver.

        Args:
            cluster: Ready instances.
            driver: A fresh driver.
            policy_version: Version of the weights that the instances hold.
            on_event: Called with (seconds, event, commands) for every event, for displays.
            chaos: Faults.
            history: Events of a rollout whose controller died, from its first on. The first `run` goes on with it: what
                is finished stays so, what was under way at the old instances goes on at these, whose ids are new.
        """
        self._cluster, self._driver, self._on_event = cluster, driver, on_event
        self._chaos = Chaos(chaos)
        self._started = time.perf_counter()
        self._num_lost = self._num_resumed = 0
        self.policy_version = policy_version
        self._log: Callable[[Event], None] | None = None
        self._history, self._new_infos = list(history), list(cluster.infos)

    @property
    def is_resuming(self) -> bool:
        """Whether the next `run` goes on with a rollout that another process began."""
        return bool(self._history)

    def run(
        self,
        groups: Sequence[RolloutGroup],
        *,
        policy_version: int = 0,
        get_params: Callable[[], Any] | None = None,
        log: Callable[[Event], None] | None = None,
    ) -> RolloutResult:
        """Roll out all groups with one policy.

        Args:
            groups: The prompts of the iteration.
            policy_version: Version of the weights to use.
            get_params: Gives those weights as host arrays; called if the instances hold another version.
            log: Called with every event before anything follows from it. Together, after the history if there was one,
                they are a history for a fresh driver.

        Raises:
            ConfigError: If a prompt is empty or too long.
            CapacityError: If a request can never fit in any instance.
        """
        updating = time.perf_counter()
        params = None
        if policy_version != self.policy_version:
            if get_params is None:
                raise ProtocolError(f"instances hold policy version {self.policy_version}, {policy_version} is wanted")
            params = get_params()
        self._cluster.start_iteration(policy_version, params)
        self.policy_version = policy_version
        self._started = started = time.perf_counter()
        statuses: dict[int, InstanceStatus] = {}
        self._log, num_replayed = log, len(self._history)
        samples, commands = self._join(policy_version)
        finish_times: list[float] = []
        known_tokens = sum(len(sample.token_ids) for sample in samples) + sum(
            request.num_generated
            for request in (*self._driver.buffer.waiting.values(), *self._driver.buffer.running.values())
        )
        self._chaos.start(sum(group.group_size for group in groups))
        if not samples and not self._driver.buffer:
            commands = self._submit(groups, policy_version)
        while True:
            starts: dict[int, list[RequestChunk]] = defaultdict(list)
            for command in commands:
                match command:
                    case StartChunk():
                        starts[command.instance_id].append(command.chunk)
                    case EmitSample():
                        samples.append(command.sample)
                        finish_times.append(time.perf_counter() - started)
            if not self._driver.buffer:
                break
            if starts:
                self._cluster.send(starts)
            for instance_id in self._chaos.victims(len(samples), self._driver.loads):
                self._cluster.kill(instance_id)
            if self._chaos.kills_pool_owner(len(samples)):
                self._cluster.kill_pool_owner()
            commands = []
            for event in self._cluster.wait():
                if isinstance(event, InstanceReport):
                    statuses[event.status.instance_id] = event.status
                commands += self._handle(event)
        samples.sort(key=lambda sample: sample.request_id)
        stats = summarize(
            samples,
            finish_times,
            statuses.values(),
            time.perf_counter() - started,
            self._cluster.pool_stats(),
            known_tokens=known_tokens,
            messages_dropped=self._cluster.num_dropped_messages,
            instances_lost=self._num_lost,
            chunks_resumed=self._num_resumed,
            replayed_events=num_replayed,
        )
        self._num_lost = self._num_resumed = 0
        weights_update_s = started - updating if params is not None else 0.0
        return RolloutResult(samples=samples, stats=stats, weights_update_s=weights_update_s)

    def close(self) -> None:
        """Stop the instances."""
        self._cluster.close()

    def _join(self, policy_version: int) -> tuple[list[Sample], list[Command]]:
        """Replay the history and put the new instances in the place of its own; what is finished, what is to do."""
        if self._log is not None and not self._history:
            for load in self._driver.loads.values():
                self._log(InstanceJoined(info=load.info, policy_version=policy_version))
        replayed = replay(self._history, self._driver)
        samples = [command.sample for command in replayed if isinstance(command, EmitSample)]
        gone = tuple(self._driver.loads) if self._history else ()
        commands: list[Command] = []
        for info in self._new_infos:
            commands += self._handle(InstanceJoined(info=info, policy_version=policy_version))
        for instance_id in gone:
            commands += self._handle(InstanceLost(instance_id=instance_id))
        self._num_lost = self._num_resumed = 0  # The old ones did not die in what is to come.
        self._history, self._new_infos = [], []
        return samples, commands

    def _submit(self, groups: Sequence[RolloutGroup], policy_version: int) -> list[Command]:
        while not self._driver.loads and self._cluster.expects_instances:  # The last ones died with the last iteration.
            for event in self._cluster.wait():
                self._handle(event)
        return self._handle(GroupsSubmitted(groups=tuple(groups), policy_version=policy_version))

    def _handle(self, event: Event) -> list[Command]:
        if isinstance(event, InstanceLost):
            self._num_lost += 1
            self._num_resumed += len(self._driver.loads[event.instance_id].in_flight)
        try:
            commands = self._driver.handle(event)
        except InstanceLostError:
            if not self._cluster.expects_instances:
                raise
            commands = []  # The loss is booked; those that are on their way take what remains.
        if self._log is not None:
            self._log(event)
        if self._on_event is not None:
            self._on_event(time.perf_counter() - self._started, event, commands)
        return commands


def summarize(
    samples: Sequence[Sample],
    finish_times: Sequence[float],
    statuses: Iterable[InstanceStatus],
    rollout_time_s: float,
    pool: PoolStats,
    *,
    known_tokens: int = 0,
    messages_dropped: int = 0,
    instances_lost: int = 0,
    chunks_resumed: int = 0,
    replayed_events: int = 0,
) -> RolloutStats:
    """Figures of a finished rollout; of a resumed one, speed and tail are of what was left to do.

    What instances saw of a shared pool is in `statuses`, what happened inside it in `pool`.
    """
    statuses = list(statuses)
    generated = sum(len(sample.token_ids) for sample in samples)
    busy_s = sum(s.host_time_s + s.device_time_s for s in statuses)
    num_verified = sum(s.num_verified for s in statuses)
    return RolloutStats(
        num_requests=len(samples),
        generated_tokens=generated,
        rollout_time_s=rollout_time_s,
        tokens_per_s=(generated - known_tokens) / rollout_time_s,
        tail_time_s=tail_time_s(finish_times, rollout_time_s) if finish_times else 0.0,
        num_preemptions=sum(s.num_preemptions for s in statuses),
        num_chunks=sum(sample.num_chunks for sample in samples),
        prefilled_tokens=sum(s.num_prefilled_tokens for s in statuses),
        re_prefilled_tokens=sum(s.num_reprefilled_tokens for s in statuses),
        shared_tokens=sum(s.num_shared_tokens for s in statuses),
        imported_tokens=sum(s.num_imported_tokens for s in statuses),
        max_kv_utilization=max((s.max_kv_utilization for s in statuses), default=0.0),
        host_time_share=sum(s.host_time_s for s in statuses) / busy_s if busy_s else 0.0,
        num_steps=sum(s.num_steps for s in statuses),
        drafted_tokens=sum(s.num_drafted_tokens for s in statuses),
        accepted_tokens=sum(s.num_accepted_tokens for s in statuses),
        mean_acceptance_length=1 + sum(s.num_accepted_tokens for s in statuses) / max(1, num_verified),
        draft_time_s=sum((s.draft_time_s for s in statuses), 0.0),
        verify_time_s=sum((s.verify_time_s for s in statuses), 0.0),
        blocks_corrupt=sum(s.num_corrupt_blocks for s in statuses),
        blocks_lost=pool.num_evicted + sum(s.num_lost_blocks for s in statuses),
        spilled_bytes=pool.spilled_bytes + sum(s.num_spilled_bytes for s in statuses),
        kv_wait_s=sum((s.kv_wait_s for s in statuses), 0.0),
        saved_bytes=sum(s.num_saved_bytes for s in statuses),
        moves_declined=sum(s.num_declined_moves for s in statuses),
        pool_peak_bytes=pool.peak_dram_bytes + sum(s.pool_peak_bytes for s in statuses),
        pool_owners_lost=pool.num_owners_lost,
        messages_dropped=messages_dropped,
        instances_lost=instances_lost,
        chunks_resumed=chunks_resumed,
        replayed_events=replayed_events,
        output_sha256=output_sha256(list(samples)),
    )
