"""A whole rollout: the same tokens for every policy, number of instances, chunk size and memory."""

import dataclasses

import numpy as np
import pytest

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import CapacityError, ProtocolError
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.rollout import RolloutResult, RolloutRunner, summarize
from seer_jax.kvpool import PoolStats
from tests.engine import tiny

SAMPLING = SamplingParams(max_tokens=40, stop_token_ids=(1, 2), seed=5)


def make_runner(policy: str = "seer", instances: int = 2, chunk_size: int = 8, num_pages: int = 64) -> RolloutRunner:
    config = dataclasses.replace(tiny.CONFIG, deterministic=True, num_pages=num_pages)
    engines = [Engine(tiny.MODEL, tiny.params(), config, instance_id=i) for i in range(instances)]
    settings = RolloutConfig(chunk_size=chunk_size, prefetch_chunks=1, starvation_interval=5)
    return RolloutRunner(LocalCluster(engines), RolloutDriver(make_policy(policy, settings)))


def roll_out(**kwargs: object) -> RolloutResult:
    return make_runner(**kwargs).run(tiny.groups(3, 4, SAMPLING))


def test_output_is_the_same_for_every_policy_instance_count_chunk_size_and_memory() -> None:
    plain = roll_out(instances=1, chunk_size=40, num_pages=128)
    assert len({len(sample.token_ids) for sample in plain.samples}) > 3  # lengths vary, or nothing is tested
    variants = [
        roll_out(),
        roll_out(chunk_size=3),
        roll_out(instances=3, chunk_size=16, num_pages=22),
        roll_out(policy="group_round_robin"),
        roll_out(policy="group_round_robin", num_pages=22),
    ]
    assert {result.stats.output_sha256 for result in variants} == {plain.stats.output_sha256}
    assert max(result.stats.num_chunks for result in variants) > 2 * plain.stats.num_chunks
    for result in variants:
        for sample, expected in zip(result.samples, plain.samples, strict=True):
            assert sample.logprobs.tobytes() == expected.logprobs.tobytes()


def test_seer_never_preempts_where_the_baseline_must() -> None:
    seer, baseline = roll_out(num_pages=22), roll_out(policy="group_round_robin", num_pages=22)
    assert seer.stats.num_preemptions == 0 and seer.stats.re_prefilled_tokens == 0
    assert baseline.stats.num_preemptions > 0 and baseline.stats.re_prefilled_tokens > 0
    assert seer.stats.generated_tokens == baseline.stats.generated_tokens


def test_responses_of_a_group_differ() -> None:
    result = roll_out()
    responses = {(s.request_id.group_id, s.token_ids.tobytes()) for s in result.samples}
    assert len(responses) == len(result.samples)


def test_new_weights_and_new_iterations_change_the_samples_and_stamp_their_version() -> None:
    runner = make_runner()
    first = runner.run(tiny.groups(3, 4, SAMPLING))
    again = runner.run(tiny.groups(3, 4, SAMPLING))
    next_iteration = runner.run(tiny.groups(3, 4, SAMPLING, iteration=1))
    updated = runner.run(tiny.groups(3, 4, SAMPLING), policy_version=1, get_params=lambda: tiny.params(1))
    hashes = [result.stats.output_sha256 for result in (first, again, next_iteration, updated)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert {sample.policy_version for sample in updated.samples} == {1}
    assert updated.weights_update_s > 0 and again.weights_update_s == 0


def test_rollout_of_a_version_that_nobody_holds_is_refused() -> None:
    with pytest.raises(ProtocolError, match="policy version 0, 2 is wanted"):
        make_runner().run(tiny.groups(1, 2, SAMPLING), policy_version=2)


def test_request_that_never_fits_is_refused_before_anything_runs_and_the_runner_stays_usable() -> None:
    runner = make_runner(num_pages=12)
    with pytest.raises(CapacityError, match="num_pages"):
        runner.run(tiny.groups(3, 4, SAMPLING))
    short = dataclasses.replace(SAMPLING, max_tokens=8)
    assert len(runner.run(tiny.groups(3, 4, short)).samples) == 12


def test_tail_time_runs_from_the_90th_percentile_finish_to_the_end() -> None:
    samples = roll_out().samples[:10]
    finish_times = np.arange(1.0, 11.0)
    stats = summarize(samples, finish_times.tolist(), [], rollout_time_s=10.5, pool=PoolStats())
    assert stats.tail_time_s == 10.5 - 9.0
