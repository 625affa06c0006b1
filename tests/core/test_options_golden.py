"""Small cases by hand: the orders of the baselines, and an option is counted when it changes a decision."""

import pytest

from seer_jax.config.schema import RolloutConfig
from seer_jax.core.commands import StartChunk
from seer_jax.core.context import OracleEstimator
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import GroupsSubmitted, InstanceJoined
from seer_jax.core.posterior import PosteriorEstimator
from seer_jax.core.scheduling import (
    ORACLE_NAMES,
    DividedPolicy,
    OraclePolicy,
    SchedulingPolicy,
    SeerPolicy,
    StreamRLOraclePolicy,
    make_estimator,
    make_policy,
    switched_on,
)
from seer_jax.core.types import RequestId
from tests.core.fake_cluster import FakeCluster, finish, make_group, make_info

ONE_SLOT = make_info(0, max_num_seqs=1)


def order(driver: RolloutDriver, groups, true_lengths) -> list[tuple[int, int]]:
    """Requests in the order of their chunks on one slot."""
    cluster = FakeCluster(driver=driver, infos=[ONE_SLOT], true_lengths=true_lengths, seed=0, max_queued=0)
    names: list[tuple[int, int]] = []
    cluster.observers.append(
        lambda event, commands: names.extend(tuple(c.chunk.request_id) for c in commands if isinstance(c, StartChunk))
    )
    cluster.run(groups)
    return names


LENGTHS = {RequestId(0, 0): 5, RequestId(0, 1): 9, RequestId(1, 0): 12, RequestId(1, 1): 3}
GROUPS = [make_group(0), make_group(1)]


def test_divided_finishes_what_came_first():
    driver = RolloutDriver(DividedPolicy(chunk_size=8, prefetch_chunks=0))
    assert order(driver, GROUPS, LENGTHS) == [(0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1)]


def test_oracle_takes_the_longest_probe_or_not():
    driver = RolloutDriver(OraclePolicy(chunk_size=8, prefetch_chunks=0), OracleEstimator(LENGTHS))
    assert order(driver, GROUPS, LENGTHS) == [(1, 0), (1, 0), (0, 1), (0, 1), (0, 0), (1, 1)]


def test_streamrl_deals_equal_work_and_sends_whole_groups_longest_first():
    """Groups of 2 with lengths 41, 36, 16, 8: squares of 1681, 1296, 256, 64 on two instances are 1681 and 1616."""
    true_lengths = {RequestId(g, i): length for g, length in enumerate((16, 41, 36, 8)) for i in (0, 1)}
    policy = StreamRLOraclePolicy(true_lengths=true_lengths, num_buckets=2)
    long, short = policy.buckets((3, 7))
    assert (long.group_ids, long.instance_ids, long.mean_length) == ((1,), (3,), 41)
    assert (short.group_ids, short.instance_ids) == ((2, 0, 3), (7,)) and short.mean_length == 20
    driver = RolloutDriver(policy, OracleEstimator(true_lengths))
    for number in (3, 7):  # 18 pages of 4 tokens: of the short bucket (4 + 20) 3 fit, of the long one (4 + 41) 1.
        info = make_info(number, num_total_pages=18, max_num_seqs=9, max_model_len=64)
        driver.handle(InstanceJoined(info=info, policy_version=0))
    groups = tuple(make_group(g, max_tokens=48) for g in range(4))
    starts = driver.handle(GroupsSubmitted(groups=groups, policy_version=0))
    assert [(s.instance_id, tuple(s.chunk.request_id)) for s in starts] == [
        (3, (1, 0)), (3, (1, 1)), (7, (2, 0)), (7, (2, 1)), (7, (0, 0)), (7, (0, 1)),
    ]  # fmt: skip
    assert driver.handle(finish(7, starts[2].chunk, 36))[1:] == [], "three in flight and half a group are too many"
    commands = driver.handle(finish(7, starts[3].chunk, 36))
    assert [tuple(c.chunk.request_id) for c in commands if isinstance(c, StartChunk)] == [(3, 0), (3, 1)]


def test_streamrl_gives_every_bucket_its_share_of_the_instances():
    true_lengths = {RequestId(g, i): 1 + g for g in range(40) for i in range(4)}
    buckets = StreamRLOraclePolicy(true_lengths=true_lengths).buckets(tuple(range(10)))
    assert [len(bucket.instance_ids) for bucket in buckets] == [2, 3, 2, 3]
    assert sorted(g for bucket in buckets for g in bucket.group_ids) == list(range(40))
    work = [sum(4 * (1 + g) ** 2 for g in bucket.group_ids) / len(bucket.instance_ids) for bucket in buckets]
    assert max(work) < 1.3 * min(work)


def test_the_posterior_is_counted_where_its_estimate_is_another():
    driver = RolloutDriver(SeerPolicy(chunk_size=4, starvation_interval=0, prefetch_chunks=0), PosteriorEstimator())
    lengths = LENGTHS | {RequestId(5, 0): 1}
    cluster = FakeCluster(driver=driver, infos=[ONE_SLOT], true_lengths=lengths, seed=0, max_queued=0)
    cluster.run(GROUPS)
    assert 0 < driver.firings["posterior"] <= 4, "the chunks of the two that are no probes"
    cluster.run([make_group(5, size=1)])
    assert dict(driver.firings) == {}, "a new iteration counts anew, and a probe is picked by no estimate"


@pytest.mark.parametrize("name", ORACLE_NAMES)
def test_policies_that_need_the_truth_are_refused_where_nobody_knows_it(name):
    for make in (make_policy, make_estimator):
        with pytest.raises(ConfigError, match=r"rollout\.policy: .*true lengths"):
            make(name, RolloutConfig())
    assert isinstance(make_policy(name, RolloutConfig(), LENGTHS), SchedulingPolicy)
    assert make_estimator(name, RolloutConfig(), LENGTHS) == OracleEstimator(LENGTHS)


def test_the_estimator_is_the_one_asked_for():
    config = RolloutConfig(length_estimator="posterior")
    assert make_estimator("seer", config) == PosteriorEstimator()
    assert switched_on(config) == ("posterior", "share_prompts")
    assert switched_on(RolloutConfig(share_prompts=False)) == ()
    assert make_estimator("divided", config) != PosteriorEstimator(), "it would only cost"
