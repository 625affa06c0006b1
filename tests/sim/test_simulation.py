"""The simulator against arithmetic that can be done by hand, and against the planner of the real engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.batching import BatchPlanner
from seer_jax.core.errors import ConfigError
from seer_jax.core.scheduling import DividedPolicy, GroupRoundRobinPolicy, SeerPolicy
from seer_jax.core.sequence import NewTokens
from seer_jax.core.types import InstanceInfo, KVHandle, RequestChunk, RequestId, SamplingParams
from seer_jax.sim.instance import SimInstance
from seer_jax.sim.lengths import sample_lengths
from seer_jax.sim.simulation import SimCluster, SimRequests, SimResult, Simulation
from seer_jax.sim.systems import SYSTEMS, System, draw_requests, simulate
from seer_jax.sim.workloads import Workload, load_workload
from tests.core.fake_cluster import property_settings


@dataclass(frozen=True)
class LinearTimes:
    """A step takes fixed_s + seq_s per request + context_s per token of context; prefill is free unless told."""

    fixed_s: float = 0.01
    seq_s: float = 0.0
    context_s: float = 0.0
    token_s: float = 0.0

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        return self.fixed_s + num_seqs * (self.seq_s + self.context_s * mean_context)

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        return self.plain_step_s(num_seqs, mean_context) + 0.0 * (num_tokens - num_seqs)

    def prefill_s(self, num_tokens: int, start: int = 0) -> float:
        return self.token_s * num_tokens


def small_workload(*, instances: int = 1, kv_tokens: int = 1 << 20, slots: int = 64, page_size: int = 16) -> Workload:
    """Moonlight with another cluster and prompts of 10 tokens."""
    workload = load_workload("moonlight")
    return workload.with_values(
        {
            "cluster.num_instances": instances,
            "cluster.kv_bytes_per_rank": kv_tokens * workload.kv_bytes_per_token,
            "cluster.page_size": page_size,
            "cluster.max_num_seqs": slots,
            "requests.prompt_tokens": 10,
        }
    )


def run(
    lengths: Sequence[Sequence[int]], policy: object, times: LinearTimes, *, limit: int = 4096, **cluster: int
) -> SimResult:
    requests = SimRequests(
        lengths=np.asarray(lengths),
        prompts=np.full(len(lengths), 10),
        limits=np.full(len(lengths), limit),
    )
    return Simulation(
        cluster=SimCluster.of(small_workload(**cluster), requests, times), requests=requests, policy=policy
    ).run()


SEER = SeerPolicy(chunk_size=256, starvation_interval=64, prefetch_chunks=0)


@pytest.mark.parametrize("policy", [SEER, GroupRoundRobinPolicy(), DividedPolicy(chunk_size=100, prefetch_chunks=0)])
def test_equal_lengths_on_one_instance_take_the_exact_time(policy):
    times = LinearTimes(fixed_s=0.01, seq_s=0.001, context_s=1e-6)
    result = run([[1000] * 4] * 4, policy, times)
    # 16 requests, step k at context 10 + k - 1 .. : the k-th step starts with 10 + k tokens known, k = 0 .. 999.
    # Time between two steps is taken as even, so the sum is the integral from 10 to 1010.
    expected = 1000 * (0.01 + 16 * 0.001) + 16 * 1e-6 * (1010**2 - 10**2) / 2
    assert result.rollout_time_s == pytest.approx(expected, rel=1e-9)
    assert result.tail_time_s == pytest.approx(0, abs=1e-9)
    assert result.generated_tokens == 16_000
    assert result.counters.num_steps == pytest.approx(1000)


def test_waves_when_slots_bind():
    result = run([[500]] * 12, GroupRoundRobinPolicy(), LinearTimes(), slots=4)
    assert result.rollout_time_s == pytest.approx(3 * 500 * 0.01)


def test_prefill_stalls_the_batch_and_each_prompt_counts_once():
    result = run([[100]] * 3, GroupRoundRobinPolicy(), LinearTimes(token_s=0.1))
    assert result.counters.num_prefilled_tokens == 3 * 9  # The newest token is computed by the first decode step.
    assert result.rollout_time_s == pytest.approx(100 * 0.01 + 27 * 0.1)


def test_a_request_that_moves_waits_for_its_kv_and_one_that_stays_does_not():
    instances = [
        SimInstance(
            InstanceInfo(instance_id=number, num_total_pages=64, page_size=8, max_num_seqs=2, max_model_len=400),
            LinearTimes(),
            lambda chunk: 200,
            kv_bytes_per_token=1000.0,
            transfer_bytes_per_s=1e5,
            transfer_latency_s=0.5,
        )
        for number in (0, 1)
    ]
    first = chunk_of(0, 100)
    instances[0].start(first)
    instances[0].plan()
    assert instances[0].next_event_s == pytest.approx(1.0)
    instances[0].advance(instances[0].next_event_s)
    (result,) = instances[0].collect()
    assert result.finish_reason == "length" and result.kv is None  # At its own limit: nothing follows.
    kv = KVHandle(num_tokens=109, policy_version=0, ref=0)
    for instance, ready_s in zip(instances, (0.0, 0.5 + 109 * 1000 / 1e5), strict=True):
        later = replace(first, chunk_index=1, token_ids=np.zeros(110, np.int32), max_total_tokens=310, kv=kv)
        instance.advance(1.0)
        instance.start(later)
        instance.plan()
        while not (ended := instance.collect()):
            instance.advance(instance.next_event_s)
            if instance._segment.steps == 0:
                instance.plan()
        assert ended[0].finish_reason == "stop"
        assert instance.now == pytest.approx(1.0 + ready_s + 100 * 0.01)
    assert [instance.counters.num_imported_tokens for instance in instances] == [0, 109]


def test_the_tail_starts_with_the_end_of_the_90th_percentile_request():
    # One request a slot; 20 of them end at 1, 2, ... 20 seconds: the 18th is the last that is no tail.
    lengths = [[100 * (number + 1)] for number in range(20)]
    result = run(lengths, GroupRoundRobinPolicy(), LinearTimes())
    assert result.rollout_time_s == pytest.approx(20.0)
    assert result.tail_time_s == pytest.approx(2.0)


def test_data_parallel_ranks_share_the_bandwidth_of_their_instance():
    kimi = load_workload("kimi_k2")
    cluster = SimCluster.of(kimi, draw_requests(kimi.scaled(0.1), 1))
    assert cluster.transfer_bytes_per_s == kimi.transfer_bytes_per_s / 32


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int]:
    size = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.lists(st.integers(1, 300), min_size=size, max_size=size), min_size=1, max_size=8))
    return lengths, draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(400, 3000))


@given(cases(), st.sampled_from(["seer", "divided", "group_round_robin"]))
@property_settings(max_examples=60)
def test_every_token_once_and_no_faster_than_the_bounds(case, name):
    lengths, instances, slots, kv_tokens = case
    policy = {
        "seer": replace(SEER, chunk_size=64),
        "divided": DividedPolicy(chunk_size=64, prefetch_chunks=0),
        "group_round_robin": GroupRoundRobinPolicy(),
    }[name]
    result = run(lengths, policy, LinearTimes(), limit=300, instances=instances, slots=slots, kv_tokens=kv_tokens)
    total, longest = sum(map(sum, lengths)), max(map(max, lengths))
    assert len(result.finish_times) == sum(map(len, lengths))
    assert result.generated_tokens == total
    assert result.counters.num_emitted_tokens == pytest.approx(total, rel=1e-6)
    assert result.rollout_time_s >= 0.01 * max(longest, total / (instances * slots)) * (1 - 1e-9)
    if name != "group_round_robin":
        assert result.counters.num_preemptions == 0
        assert result.counters.num_reprefilled_tokens == 0


def test_the_same_seed_gives_the_same_rollout_and_another_one_does_not():
    workload = load_workload("moonlight").scaled(0.05)
    first, again = (simulate(workload, SYSTEMS["seer"], draw_requests(workload, 3), seed=3) for _ in range(2))
    other = simulate(workload, SYSTEMS["seer"], draw_requests(workload, 3), seed=4)
    np.testing.assert_array_equal(first.finish_times, again.finish_times)
    assert first.rollout_time_s != other.rollout_time_s
    assert first.rollout_time_s == pytest.approx(other.rollout_time_s, rel=0.1)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("moonlight", 0.1),
        pytest.param("qwen2_vl_72b", 0.12, marks=pytest.mark.slow),
        pytest.param("kimi_k2", 0.25, marks=pytest.mark.slow),
    ],
)
def test_order_of_the_systems(name, scale):
    workload = load_workload(name).scaled(scale)
    requests = draw_requests(workload, 11)
    results = {
        system: simulate(workload, SYSTEMS[system], requests) for system in ("verl", "context", "oracle", "seer")
    }
    times = {system: result.rollout_time_s for system, result in results.items()}
    # Longest first is a heuristic: on one draw context may beat the truth by a hair.
    assert times["oracle"] <= 1.02 * times["context"]
    assert times["seer"] < times["context"] <= times["verl"]
    for system in ("context", "oracle", "seer"):
        assert results[system].counters.num_preemptions == 0
    assert results["seer"].mean_acceptance_length > 1.2
    assert results["verl"].mean_acceptance_length == pytest.approx(1)


def test_ranks_wait_for_the_fullest_one():
    workload = load_workload("kimi_k2").with_values({"cluster.num_instances": 1, "requests.prompt_tokens": 10})
    lengths = np.full((1, workload.ranks_per_instance + 1), 100)
    requests = SimRequests(lengths=lengths, prompts=np.array([10]), limits=np.array([200]))
    times = LinearTimes(fixed_s=0.0, seq_s=0.001)
    cluster = SimCluster.of(workload, requests, times)
    result = Simulation(cluster=cluster, requests=requests, policy=GroupRoundRobinPolicy()).run()
    # One rank has two requests: all 32 step as if each had two.
    assert result.rollout_time_s == pytest.approx(100 * 0.001 * 2 * 32)


def test_a_request_too_long_for_a_rank_is_refused():
    with pytest.raises(ConfigError, match="kv_bytes_per_rank"):
        run([[100]], GroupRoundRobinPolicy(), LinearTimes(), limit=5000, kv_tokens=4096)


def test_partial_rollouts_stop_when_enough_have_finished_and_say_what_is_left():
    workload = small_workload(slots=8)
    requests = SimRequests(
        lengths=np.array([[100], [200], [300], [400]]), prompts=np.full(4, 10), limits=np.full(4, 500)
    )
    system = System(label="veRL", policy="group_round_robin")
    result = simulate(workload, system, requests, times=LinearTimes(), stop_after=2)
    assert result.rollout_time_s == pytest.approx(2.0)
    assert result.unfinished == {(2, 0): 200, (3, 0): 200}
    assert result.generated_tokens == 300


@pytest.mark.parametrize("instances", [1, 2])
def test_what_ends_at_the_moment_of_the_cut_counts_as_finished(instances):
    workload = small_workload(slots=8, instances=instances)
    requests = SimRequests(
        lengths=np.array([[100], [200], [200], [400]]), prompts=np.full(4, 10), limits=np.full(4, 500)
    )
    system = System(label="veRL", policy="group_round_robin")
    result = simulate(workload, system, requests, times=LinearTimes(), stop_after=2)
    assert result.unfinished == {(3, 0): 200}
    assert result.generated_tokens == 500 and len(result.finish_times) == 3


def planner_run(lengths: Sequence[int], info: InstanceInfo) -> tuple[int, list[int]]:
    """Steps and preemptions of the engine's planner for requests that all arrive at once; the order in which they end.

    Prefill is unbounded, so an admitted request decodes from the next step on, as in the simulator.
    """
    planner = BatchPlanner(info, max_prefill_tokens=1 << 20, prefill_tile=1, max_steps_per_dispatch=1)
    for number, length in enumerate(lengths):
        planner.add(chunk_of(number, length))
    ended = []
    while planner.waiting or planner.running:
        planner.admit()
        plan = planner.plan()
        assert plan is not None
        rows = [*plan.decodes, *(piece.sequence for piece in plan.prefills if piece.is_last)]
        token = NewTokens(np.zeros(1, np.int32), np.zeros(1, np.float32))
        for sequence in planner.commit(plan, dict.fromkeys(rows, token)):
            ended.append(sequence.chunk.request_id.group_id)
            planner.release(sequence)
    return planner.num_preemptions, ended


def chunk_of(number: int, length: int) -> RequestChunk:
    return RequestChunk(
        request_id=RequestId(number, 0),
        chunk_index=0,
        token_ids=np.full(10, number, np.int32),
        num_prompt_tokens=10,
        max_chunk_tokens=length,
        max_total_tokens=10 + length,
        num_reserved_pages=0,
        policy_version=0,
        priority=0,
        sampling=SamplingParams(max_tokens=length),
        sampling_key=0,
    )


def simulated_run(lengths: Sequence[int], info: InstanceInfo) -> tuple[int, list[int]]:
    instance = SimInstance(info, LinearTimes(), lambda chunk: lengths[chunk.request_id.group_id])
    for number, length in enumerate(lengths):
        instance.start(chunk_of(number, length))
    instance.plan()
    ended = []
    while instance.next_event_s < np.inf:
        instance.advance(instance.next_event_s)
        ended += [event.request_id.group_id for event in instance.collect()]
        instance.plan()
    return instance.counters.num_preemptions, ended


def test_preemption_matches_the_planner_of_the_engine():
    rng = np.random.default_rng(5)
    agreed, preempted = 0, 0
    for _ in range(20):
        lengths = rng.integers(50, 400, 16).tolist()
        info = InstanceInfo(instance_id=0, num_total_pages=160, page_size=8, max_num_seqs=16, max_model_len=500)
        (planned, order), (simulated, sim_order) = planner_run(lengths, info), simulated_run(lengths, info)
        assert sorted(order) == sorted(sim_order) == list(range(16))
        # Half a page per request is taken to be empty, so single decisions may differ; the storm may not.
        assert abs(planned - simulated) <= max(2, 0.25 * planned), (planned, simulated)
        preempted += planned
        agreed += sum(a == b for a, b in zip(order, sim_order, strict=True))
    assert preempted > 100, "nothing was preempted: the test shows nothing"
    assert agreed > 0.7 * 20 * 16


def test_lengths_are_paired_across_systems():
    workload = load_workload("moonlight").scaled(0.05)
    a, b = draw_requests(workload, 7), draw_requests(workload, 7)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    rng = np.random.default_rng(7)
    expected = sample_lengths(workload.lengths, workload.num_groups, workload.group_size, rng)
    np.testing.assert_array_equal(a.lengths, expected)
