"""Joined instances: the same chips, a part of the experts on each, what is freed goes to KV, the exchange is paid."""

import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.sim.systems import SYSTEMS, draw_requests, simulate
from seer_jax.sim.wide import can_widen, widen
from seer_jax.sim.workloads import load_workload

KIMI = load_workload("kimi_k2")
WIDE = widen(KIMI, 2)
SEQS, CONTEXT = 256, 30_000.0


def test_joined_instances_have_the_same_chips_ranks_and_slots():
    for name in ("chips_per_instance", "ranks_per_instance", "max_num_seqs", "transfer_bytes_per_s"):
        assert getattr(WIDE, name) * WIDE.num_instances == getattr(KIMI, name) * KIMI.num_instances
    assert (WIDE.num_instances, WIDE.num_requests, WIDE.chunk_size) == (4, KIMI.num_requests, KIMI.chunk_size)


def test_what_the_experts_leave_goes_to_kv_in_the_share_that_kv_has():
    expert_bytes = 1025.2e9 * 0.9897 / 32
    dense_bytes = 1025.2e9 * (1 - 0.9897)  # A copy on every chip.
    share = 1.892e10 / (0.9 * 80e9 - expert_bytes - dense_bytes)
    assert 0.6 < share < 0.7  # 0.66 in its source, which counts the input embedding too.
    assert WIDE.kv_bytes_per_rank == pytest.approx(1.892e10 + share * expert_bytes / 2)
    assert widen(KIMI, 4).kv_bytes_per_rank == pytest.approx(1.892e10 + share * expert_bytes * 3 / 4)


def test_a_step_reads_half_of_the_experts_per_chip_and_pays_for_the_exchange():
    bandwidth = 3.35e12 * 0.3412
    before_s = KIMI.times.plain_step_s(SEQS, CONTEXT)
    after_s = WIDE.times.plain_step_s(2 * SEQS, CONTEXT)  # As many requests per rank.
    read_s = 1025.2e9 * 0.9897 / 32 / bandwidth
    touched = [1 - (1 - 8 / 384) ** num_tokens for num_tokens in (SEQS, 2 * SEQS)]
    exchange_s = 60 * (4.87e-4 - 4.28e-4)  # 64 chips for 32, DeepEP.
    assert after_s - before_s == pytest.approx(read_s * (touched[1] / 2 - touched[0]) + exchange_s)
    assert after_s < before_s


def test_a_draft_token_costs_each_instance_that_joined_what_it_cost_alone():
    tokens = 4 * SEQS
    of_drafts = [
        float(w.times.verify_step_s(seqs, 4 * seqs, CONTEXT)) - float(w.times.forward_s(seqs, 4 * seqs, CONTEXT))
        for w, seqs in ((KIMI, SEQS), (WIDE, 2 * SEQS))
    ]
    assert of_drafts[0] == pytest.approx(0.01433 + 8.615e-06 * (tokens - SEQS))
    assert of_drafts[1] == pytest.approx(of_drafts[0])


def test_exchange_between_few_chips_grows_with_what_leaves_a_chip():
    moonlight = load_workload("moonlight")
    chips, seconds = moonlight.exchange_s_per_layer
    measured = dict(zip(chips, seconds, strict=True))
    for few in (1, 2, 4):
        assert measured[few] == pytest.approx(measured[8] * (1 - 1 / few) / (1 - 1 / 8), rel=0.01)
    wide = widen(moonlight, 2)
    assert wide.times.step_overhead_s - moonlight.times.step_overhead_s == pytest.approx(26 * 1.09e-4)


def test_without_faster_reads_only_room_is_won():
    room = widen(KIMI, 2, faster_reads=False)
    assert room.kv_bytes_per_rank == WIDE.kv_bytes_per_rank
    assert room.times.plain_step_s(2 * SEQS, CONTEXT) > KIMI.times.plain_step_s(SEQS, CONTEXT)
    many = 20_000  # All experts touched, before and after.
    memory_s = [w.times._rates[0] + w.times._rates[1] * (1 - w.times._rates[2] ** many) for w in (KIMI, room)]
    assert memory_s[0] == pytest.approx(memory_s[1])


def test_a_joined_cluster_generates_everything_and_preempts_nothing():
    small = KIMI.scaled(0.25).with_values({"requests.num_requests": 160})
    requests = draw_requests(small, 5)
    result = simulate(widen(small, 2), SYSTEMS["seer"], requests, seed=5)
    assert result.generated_tokens == requests.lengths.sum()
    assert result.counters.num_preemptions == 0


@pytest.mark.parametrize(
    ("workload", "width"),
    [(load_workload("qwen2_vl_72b"), 2), (KIMI, 3), (KIMI, 16), (KIMI.with_values({"cluster.num_instances": 64}), 64)],
)
def test_what_cannot_be_joined_is_refused(workload, width):
    assert not can_widen(workload, width)
    with pytest.raises(ConfigError, match="width"):
        widen(workload, width)


@pytest.mark.parametrize(
    ("chips", "problem"), [((1, 8), "has 2 values"), (KIMI.exchange_s_per_layer[0][::-1], "is .*ascending")]
)
def test_a_table_of_exchanges_that_does_not_fit_is_named(chips, problem):
    with pytest.raises(ConfigError, match=rf"exchange\.chips: {problem}"):
        KIMI.with_values({"exchange.chips": chips})
