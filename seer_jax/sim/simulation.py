"""Runs the real `RolloutDriver` over simulated instances: one iteration of a workload under one policy."""

import heapq
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from seer_jax.core.commands import Command, EmitSample, IterationDone, StartChunk
from seer_jax.core.context import LengthEstimator
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.events import ChunkFinished, GroupsSubmitted, InstanceJoined
from seer_jax.core.scheduling.base import SchedulingPolicy
from seer_jax.core.types import InstanceInfo, RequestChunk, RolloutGroup, SamplingParams, tail_time_s
from seer_jax.sim.batch import InstanceTimes, SimChunk, SimCounters
from seer_jax.sim.drafting import SpeculationModel
from seer_jax.sim.instance import SimInstance
from seer_jax.sim.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class SimRequests:
    """What an iteration generates.

    Attributes:
        lengths: int64 [groups, size]; true generated tokens. A ragged last group is padded with 0: no request.
        prompts: int64 [groups]; tokens of each prompt.
        limits: int64 [groups]; generation limit of each group.
    """

    lengths: np.ndarray
    prompts: np.ndarray
    limits: np.ndarray

    @classmethod
    def of(cls, workload: Workload, lengths: np.ndarray) -> "SimRequests":
        """The same prompt length and limit for all groups of a workload."""
        size = len(lengths)
        return cls(
            lengths=lengths,
            prompts=np.full(size, workload.prompt_tokens),
            limits=np.full(size, workload.lengths.limit),
        )

    def groups(self) -> tuple[RolloutGroup, ...]:
        """The groups as the driver takes them; tokens have no value."""
        prompts = {int(size): np.zeros(size, np.int32) for size in np.unique(self.prompts)}
        return tuple(
            RolloutGroup(
                group_id=number,
                prompt_token_ids=prompts[int(self.prompts[number])],
                group_size=int((row > 0).sum()),
                sampling=SamplingParams(max_tokens=int(self.limits[number])),
            )
            for number, row in enumerate(self.lengths)
        )


@dataclass(frozen=True, kw_only=True)
class SimCluster:
    """The instances.

    Attributes:
        infos: One each.
        times: Step times of any of them.
        num_ranks: Data-parallel ranks of each, which share its pages evenly.
        kv_bytes_per_token: For transfers.
        transfer_bytes_per_s: Between one rank of an instance and the pool.
        transfer_latency_s: Of each transfer.
    """

    infos: tuple[InstanceInfo, ...]
    times: InstanceTimes
    num_ranks: int = 1
    kv_bytes_per_token: float = 0.0
    transfer_bytes_per_s: float = math.inf
    transfer_latency_s: float = 0.0

    @classmethod
    def of(cls, workload: Workload, requests: SimRequests, times: InstanceTimes | None = None) -> "SimCluster":
        """That of a workload, for requests of this iteration; `times` in place of the workload's."""
        num_ranks = workload.ranks_per_instance
        infos = tuple(
            InstanceInfo(
                instance_id=number,
                num_total_pages=num_ranks * (workload.kv_tokens_per_rank // workload.page_size),
                page_size=workload.page_size,
                max_num_seqs=workload.max_num_seqs,
                max_model_len=int((requests.prompts + requests.limits).max()),
            )
            for number in range(workload.num_instances)
        )
        return cls(
            infos=infos,
            times=times or workload.times,
            num_ranks=num_ranks,
            kv_bytes_per_token=workload.kv_bytes_per_token,
            transfer_bytes_per_s=workload.transfer_bytes_per_s / num_ranks,
            transfer_latency_s=workload.transfer_latency_s,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SimResult:
    """Figures of one simulated iteration; times in simulated seconds.

    Attributes:
        finish_times: float64 [finished requests], ascending.
        tail_time_s: From the end of the 90th percentile request to the end.
        generated_tokens: Of the requests that finished.
        counters: Of all instances together; `max_kv_tokens` is that of the fullest.
        changes: float64 [n, 4]; (time, instance, running requests, share of KV in use) if recorded.
        spans: (instance, name, start, end) of every chunk if recorded.
        unfinished: Generated tokens of what was cut off, by (group, index); empty unless `stop_after` was given.
        firings: How often an option of the policy changed a decision.
    """

    rollout_time_s: float
    tail_time_s: float
    finish_times: np.ndarray
    generated_tokens: int
    num_chunks: int
    counters: SimCounters
    firings: dict[str, int]
    changes: np.ndarray
    spans: tuple[tuple[int, str, float, float], ...]
    unfinished: Mapping[tuple[int, int], int]

    @property
    def tokens_per_s(self) -> float:
        """Throughput of finished requests."""
        return self.generated_tokens / self.rollout_time_s

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per request and step; 1 without speculation."""
        return self.counters.num_emitted_tokens / max(self.counters.num_request_steps, 1e-9)


@dataclass(kw_only=True)
class Simulation:
    """One iteration.

    Attributes:
        cluster: Where it runs.
        requests: What is generated; the same for all policies that are compared.
        policy: Whichever of `core.scheduling`.
        estimator: Its length estimator; None: the paper's.
        speculation: None: plain decoding.
        progress: float64 [groups, size]; shared with a `GroupedSpeculation`.
        seed: Of the drafts' luck.
        stop_after: Requests after which the rest is cut off (partial rollout); None: all.
        record: Keep `changes` and `spans`.
    """

    cluster: SimCluster
    requests: SimRequests
    policy: SchedulingPolicy
    estimator: LengthEstimator | None = None
    speculation: SpeculationModel | None = None
    progress: np.ndarray | None = None
    seed: int = 0
    stop_after: int | None = None
    record: bool = False
    _changes: list[tuple[float, int, int, float]] = field(default_factory=list, init=False)
    _spans: list[tuple[int, str, float, float]] = field(default_factory=list, init=False)

    def run(self) -> SimResult:
        """Simulate; deterministic in all attributes."""
        driver = RolloutDriver(self.policy, self.estimator)
        self._instances = {info.instance_id: self._make_instance(info) for info in self.cluster.infos}
        for instance in self._instances.values():
            driver.handle(InstanceJoined(info=instance.info, policy_version=0))
        self._finish_times: list[float] = []
        self._num_generated = self._num_chunks = 0
        self._is_done = False
        events: list[tuple[float, int]] = []
        now = 0.0
        pending: deque[ChunkFinished] = deque()
        submitted = GroupsSubmitted(groups=self.requests.groups(), policy_version=0)
        touched = self._carry_out(driver.handle(submitted), now, pending)
        while not self._is_done:
            for number in sorted(touched):
                instance = self._instances[number]
                instance.plan()
                if instance.next_event_s < math.inf:
                    heapq.heappush(events, (instance.next_event_s, number))
            touched = set()
            now, number = heapq.heappop(events)
            instance = self._instances[number]
            if now != instance.next_event_s:
                continue  # Planned again since.
            instance.advance(now)
            touched.add(number)
            pending.extend(instance.collect())
            while pending:
                touched |= self._carry_out(driver.handle(pending.popleft()), now, pending)
            if self.stop_after is not None and len(self._finish_times) >= self.stop_after:
                self._settle(driver, now)
                break
        return self._result(driver, now)

    def _settle(self, driver: RolloutDriver, now: float) -> None:
        """Let everything that ends at this very moment end, before the rest is cut off."""
        pending: deque[ChunkFinished] = deque()
        for instance in self._instances.values():
            instance.advance(min(now, instance.next_event_s))
            pending.extend(instance.collect())
        while pending:
            self._carry_out(driver.handle(pending.popleft()), now, pending)

    def _make_instance(self, info: InstanceInfo) -> SimInstance:
        cluster, lengths = self.cluster, self.requests.lengths
        return SimInstance(
            info,
            cluster.times,
            lambda chunk: int(lengths[chunk.request_id]),
            num_ranks=cluster.num_ranks,
            kv_bytes_per_token=cluster.kv_bytes_per_token,
            transfer_bytes_per_s=cluster.transfer_bytes_per_s,
            transfer_latency_s=cluster.transfer_latency_s,
            speculation=self.speculation,
            progress=self.progress,
            rng=np.random.default_rng([self.seed, info.instance_id]) if self.speculation is not None else None,
            on_change=self._note_change if self.record else None,
            on_end=self._note_span if self.record else None,
        )

    def _carry_out(self, commands: list[Command], now: float, pending: deque[ChunkFinished]) -> set[int]:
        """Send chunks and count samples; returns the instances that must plan again.

        A chunk may end just when another comes: its result joins the pending ones.
        """
        touched = set()
        for command in commands:
            match command:
                case StartChunk():
                    instance = self._instances[command.instance_id]
                    instance.advance(now)
                    pending.extend(instance.collect())
                    instance.start(command.chunk)
                    self._num_chunks += 1
                    touched.add(command.instance_id)
                case EmitSample():
                    self._finish_times.append(now)
                    self._num_generated += len(command.sample.token_ids)
                case IterationDone():
                    self._is_done = True
        return touched

    def _note_change(self, now: float, instance: int, running: int, share: float) -> None:
        self._changes.append((now, instance, running, share))

    def _note_span(self, instance: int, item: SimChunk, now: float) -> None:
        request_id = item.chunk.request_id
        name = f"g{request_id.group_id}/{request_id.index}#{item.chunk.chunk_index}"
        self._spans.append((instance, name, item.started_s, now))

    def _result(self, driver: RolloutDriver, now: float) -> SimResult:
        times = np.array(self._finish_times)
        return SimResult(
            rollout_time_s=now,
            tail_time_s=tail_time_s(self._finish_times, now),
            finish_times=times,
            generated_tokens=self._num_generated,
            num_chunks=self._num_chunks,
            counters=_total([instance.counters for instance in self._instances.values()]),
            firings=dict(driver.firings),
            changes=np.array(self._changes, np.float64).reshape(-1, 4),
            spans=tuple(self._spans),
            unfinished=self._unfinished(driver),
        )

    def _unfinished(self, driver: RolloutDriver) -> dict[tuple[int, int], int]:
        left = {tuple(r.request_id): r.num_generated for r in driver.buffer.waiting.values()}
        left |= {tuple(r.request_id): r.num_generated for r in driver.buffer.running.values()}
        for instance in self._instances.values() if left else ():
            for chunk, num_new in instance.unfinished():
                left[tuple(chunk.request_id)] = _num_generated(chunk) + num_new
        return left


def _num_generated(chunk: RequestChunk) -> int:
    return len(chunk.token_ids) - chunk.num_prompt_tokens


def _total(parts: list[SimCounters]) -> SimCounters:
    """Sums; the maximum of `max_kv_tokens`."""
    names = [name for name in SimCounters.__dataclass_fields__ if name != "max_kv_tokens"]
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    return SimCounters(max_kv_tokens=max(part.max_kv_tokens for part in parts), **sums)
