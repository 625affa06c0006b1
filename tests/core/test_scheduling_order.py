"""Seer's picks equal a brute-force reading of Algorithm 2, and no group starves while the safeguard is on."""

from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.commands import Command, EmitSample, StartChunk
from seer_jax.core.context import OracleEstimator
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import ChunkFinished, Event, GroupsSubmitted, InstanceJoined, InstanceLost
from seer_jax.core.scheduling import POLICY_NAMES, SchedulingPolicy, SeerPolicy, make_policy
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId
from tests.core.fake_cluster import (
    FakeCluster,
    Scenario,
    finish,
    make_group,
    make_info,
    property_settings,
    scenarios,
)


class Algorithm2:
    """Follows events and commands and says, by plain sorting, what each decision must be."""

    def __init__(self, scenario: Scenario, *, oracle: bool) -> None:
        self.scenario, self.oracle = scenario, oracle
        self.infos: dict[int, InstanceInfo] = {info.instance_id: info for info in scenario.infos}
        self.in_flight: dict[tuple[int, RequestId], RequestChunk] = {}
        self.queued: dict[int, list[RequestChunk]] = defaultdict(list)
        self.limits = {group.group_id: group.sampling.max_tokens for group in scenario.groups}
        self.prompts = {group.group_id: len(group.prompt_token_ids) for group in scenario.groups}
        self.waiting = {
            RequestId(group.group_id, index): 0 for group in scenario.groups for index in range(group.group_size)
        }
        self.arrival = {name: number for number, name in enumerate(self.waiting)}
        self.last_instance: dict[RequestId, int] = {}
        self.longest: dict[int, int] = {}
        self.num_decisions = 0
        # When each group was last served or got waiting requests again, counted in changes of the waiting set.
        self.since = {group.group_id: number for number, group in enumerate(scenario.groups)}
        self.num_changes = len(self.since)

    def observe(self, event: Event, commands: Sequence[Command]) -> None:
        match event:
            case InstanceJoined():
                self.infos[event.info.instance_id] = event.info
            case InstanceLost():
                del self.infos[event.instance_id]
                lost = [key for key in self.in_flight if key[0] == event.instance_id]
                for key in sorted(lost, key=lambda key: self.arrival[key[1]]):
                    chunk = self.in_flight.pop(key)
                    self.wait(key[1], len(chunk.token_ids) - chunk.num_prompt_tokens)
            case ChunkFinished() if event.instance_id in self.infos:
                chunk = self.in_flight.pop((event.instance_id, event.request_id))
                self.leave(event.instance_id, chunk)
                if event.finish_reason == "chunk":
                    generated = len(chunk.token_ids) - chunk.num_prompt_tokens + len(event.token_ids)
                    self.wait(event.request_id, generated)
        for command in commands:
            if isinstance(command, EmitSample):
                group_id, length = command.sample.request_id.group_id, len(command.sample.token_ids)
                self.longest[group_id] = max(length, self.longest.get(group_id, 0))
            if isinstance(command, StartChunk):
                name = command.chunk.request_id
                assert (name, command.instance_id) == self.next_decision()
                if not self.can_start(command.instance_id, command.chunk.num_reserved_pages):
                    queue = self.queued[command.instance_id]
                    queue.append(command.chunk)
                    queue.sort(key=lambda chunk: chunk.priority)
                self.in_flight[command.instance_id, name] = command.chunk
                self.last_instance[name] = command.instance_id
                del self.waiting[name]
                self.num_decisions += 1
                self.touch(name.group_id)
        assert self.next_decision() is None, "the driver stopped although the next chunk fits"

    def running(self, instance_id: int) -> list[RequestChunk]:
        here = [chunk for key, chunk in self.in_flight.items() if key[0] == instance_id]
        return [chunk for chunk in here if chunk not in self.queued[instance_id]]

    def can_start(self, instance_id: int, num_pages: int) -> bool:
        running, info = self.running(instance_id), self.infos[instance_id]
        pages = num_pages + sum(chunk.num_reserved_pages for chunk in running)
        return not self.queued[instance_id] and len(running) < info.max_num_seqs and pages <= info.num_total_pages

    def leave(self, instance_id: int, chunk: RequestChunk) -> None:
        queue = self.queued[instance_id]
        if chunk in queue:
            queue.remove(chunk)
        waiting, self.queued[instance_id] = list(queue), []
        for index, first in enumerate(waiting):
            self.queued[instance_id] = waiting[index:]
            reserved = sum(other.num_reserved_pages for other in self.running(instance_id))
            info = self.infos[instance_id]
            if (
                len(self.running(instance_id)) >= info.max_num_seqs
                or reserved + first.num_reserved_pages > info.num_total_pages
            ):
                return
            self.queued[instance_id] = waiting[index + 1 :]

    def wait(self, name: RequestId, generated: int) -> None:
        if all(other.group_id != name.group_id for other in self.waiting):
            self.touch(name.group_id)
        self.waiting[name] = generated

    def touch(self, group_id: int) -> None:
        self.since[group_id] = self.num_changes
        self.num_changes += 1

    def next_decision(self) -> tuple[RequestId, int] | None:
        if not self.waiting:
            return None
        probes = [name for name in self.waiting if name.index == 0]
        interval = self.scenario.starvation_interval
        if interval and (self.num_decisions + 1) % interval == 0:
            group_id = min({name.group_id for name in self.waiting}, key=self.since.__getitem__)
            members = [name for name in self.waiting if name.group_id == group_id]
            name = min(members, key=lambda name: (name.index > 0, -self.waiting[name], name.index))
        elif probes:
            name = min(probes, key=lambda name: (self.waiting[name], self.arrival[name]))
        else:
            name = min(self.waiting, key=lambda n: (-self.estimate(n), -self.waiting[n], self.arrival[n]))
        generated = self.waiting[name]
        num_new = min(self.scenario.chunk_size, self.limits[name.group_id] - generated)
        total = self.prompts[name.group_id] + generated + num_new
        candidates = []
        for instance_id, info in self.infos.items():
            num_pages, num_queued = -(-total // info.page_size), len(self.queued[instance_id])
            if total > info.max_model_len or num_pages > info.num_total_pages:
                continue
            waits = not self.can_start(instance_id, num_pages)
            if not waits or num_queued < self.scenario.prefetch_chunks:
                reserved = sum(chunk.num_reserved_pages for chunk in self.running(instance_id))
                num_here = sum(key[0] == instance_id for key in self.in_flight)
                moves = self.last_instance.get(name) != instance_id
                share = reserved / info.num_total_pages
                candidates.append((waits, num_queued, moves, share, num_here, instance_id))
        return (name, min(candidates)[-1]) if candidates else None

    def estimate(self, name: RequestId) -> int:
        if self.oracle:
            return self.scenario.true_lengths[name]
        return max(self.longest.get(name.group_id, self.limits[name.group_id]), self.waiting[name])


@pytest.mark.parametrize("oracle", [False, True])
@property_settings(max_examples=60)
@given(scenario=scenarios())
def test_every_decision_equals_a_brute_force_reading_of_algorithm_2(oracle, scenario):
    policy = SeerPolicy(
        chunk_size=scenario.chunk_size,
        starvation_interval=scenario.starvation_interval,
        prefetch_chunks=scenario.prefetch_chunks,
    )
    estimator = OracleEstimator(scenario.true_lengths) if oracle else None
    cluster = FakeCluster(
        driver=RolloutDriver(policy, estimator),
        infos=scenario.infos,
        true_lengths=scenario.true_lengths,
        seed=scenario.seed,
        loss_rate=0.1,
    )
    reference = Algorithm2(scenario, oracle=oracle)
    cluster.observers.append(reference.observe)
    cluster.run(scenario.groups)
    assert reference.num_decisions >= len(scenario.true_lengths)


@property_settings(max_examples=60)
@given(scenario=scenarios())
def test_a_waiting_group_is_served_within_interval_times_groups_decisions(scenario):
    interval = scenario.starvation_interval or 3
    policy = SeerPolicy(chunk_size=scenario.chunk_size, starvation_interval=interval, prefetch_chunks=0)
    cluster = FakeCluster(
        driver=RolloutDriver(policy),
        infos=scenario.infos,
        true_lengths=scenario.true_lengths,
        seed=scenario.seed,
        loss_rate=0.1,
    )
    unserved = {group.group_id: 0 for group in scenario.groups}

    def observe(event: Event, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, StartChunk):
                for group_id in unserved:
                    unserved[group_id] += 1
                unserved[command.chunk.request_id.group_id] = 0
        waiting = {name.group_id for name in cluster.driver.buffer.waiting}
        for group_id in unserved.keys() - waiting:
            unserved[group_id] = 0
        assert max(unserved.values()) <= interval * len(scenario.groups)

    cluster.observers.append(observe)
    cluster.run(scenario.groups)


@pytest.mark.parametrize(("interval", "expected"), [(0, [1, 1, 1, 1, 0]), (3, [0, 1, 1, 1, 1]), (5, [1, 1, 0, 1, 1])])
def test_safeguard_serves_the_group_that_longest_first_leaves_behind(interval, expected):
    """One slot; group 0 turns out short (3 tokens), group 1 long (12): without safeguard group 0 waits to the end."""
    driver = RolloutDriver(SeerPolicy(chunk_size=12, starvation_interval=interval, prefetch_chunks=0))
    true_lengths = {RequestId(g, i): 12 if g else 3 for g in (0, 1) for i in range(5)}
    cluster = FakeCluster(
        driver=driver, infos=[make_info(0, max_num_seqs=1)], true_lengths=true_lengths, seed=0, max_queued=0
    )
    order: list[int] = []
    cluster.observers.append(
        lambda event, commands: order.extend(c.chunk.request_id.group_id for c in commands if isinstance(c, StartChunk))
    )
    cluster.run([make_group(0, size=2), make_group(1, size=5)])
    assert order[:2] == [0, 1] and order[2:] == expected


def test_a_request_that_fits_nowhere_blocks_those_behind_it():
    """Head of the line, as in the paper: the longest waits for pages although a shorter one would fit now."""
    driver = RolloutDriver(SeerPolicy(chunk_size=12, starvation_interval=0, prefetch_chunks=0))
    driver.handle(InstanceJoined(info=make_info(0, num_total_pages=5, max_num_seqs=4), policy_version=0))
    groups = (
        make_group(0, size=1, max_tokens=12),
        make_group(1, size=1, prompt=8),
        make_group(2, size=1, max_tokens=4),
    )
    [start] = driver.handle(GroupsSubmitted(groups=groups, policy_version=0))
    assert start.chunk.request_id == (0, 0) and start.chunk.num_reserved_pages == 4
    commands = driver.handle(finish(0, start.chunk, 5))
    assert [c.chunk.request_id for c in commands if isinstance(c, StartChunk)] == [(1, 0)], "5 of 5 pages; (2, 0) waits"


def test_chunks_queue_at_an_instance_only_when_no_other_has_a_free_slot():
    driver = RolloutDriver(SeerPolicy(chunk_size=4, starvation_interval=0, prefetch_chunks=1))
    for number, pages in enumerate((1000, 10)):
        info = make_info(number, num_total_pages=pages, max_num_seqs=1)
        driver.handle(InstanceJoined(info=info, policy_version=0))
    commands = driver.handle(GroupsSubmitted(groups=(make_group(0, size=5),), policy_version=0))
    assert [c.instance_id for c in commands] == [0, 1, 0, 1], "though instance 0 uses a smaller share of its pages"


def test_probes_are_marked_and_run_first_at_the_instance():
    driver = RolloutDriver(SeerPolicy(chunk_size=4, starvation_interval=0, prefetch_chunks=1))
    driver.handle(InstanceJoined(info=make_info(0), policy_version=0))
    commands = driver.handle(GroupsSubmitted(groups=(make_group(0), make_group(1)), policy_version=0))
    assert [(c.chunk.request_id, c.chunk.priority) for c in commands] == [((0, 0), 0), ((1, 0), 0), ((0, 1), 1)]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_is_made_by_its_name(name):
    assert isinstance(make_policy(name, RolloutConfig()), SchedulingPolicy)


def test_settings_reach_the_policy():
    settings = {"chunk_size": 7, "starvation_interval": 5, "prefetch_chunks": 3, "share_prompts": True}
    assert make_policy("seer", RolloutConfig(**settings)) == SeerPolicy(**settings)


def test_unknown_policy_is_refused_with_the_names_there_are():
    with pytest.raises(
        ConfigError, match=r"rollout\.policy: no policy 'serr' \(one of seer, divided, group_round_robin\)"
    ):
        make_policy("serr", RolloutConfig())
