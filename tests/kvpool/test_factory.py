"""Pools from a configuration, and rollouts whose instances share one in Mooncake."""

import dataclasses
import sys

import pytest

from seer_jax.config.schema import ChaosConfig, KVPoolConfig, RolloutConfig, RunConfig
from seer_jax.config.validate import MIN_MOONCAKE_SEGMENT_MIB
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.engine.factory import build_engine, build_local_cluster
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.kvpool import EmbeddedKVPool, MooncakeKVPool, Status
from seer_jax.kvpool.factory import new_run_name, open_pool
from seer_jax.kvpool.mooncake_client import MIN_SEGMENT_BYTES
from tests.engine import tiny
from tests.kvpool.blocks import get, put
from tests.kvpool.mooncake_master import Master, free_ports, needs_mooncake, shared_master

HIT, MISS = Status.HIT, Status.MISS


def mooncake_config(address, **settings):
    return RunConfig(kvpool=KVPoolConfig(backend="mooncake", mooncake_master=address, **settings))


def test_what_is_missing_at_start_is_told_by_the_setting_and_a_replacement_goes_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    config = mooncake_config("127.0.0.1:1", dram_mib=1)
    with pytest.raises(ConfigError, match=r"^kvpool\.backend: .*pip install"):
        open_pool(config, "instance-0", new_run_name(), block_bytes=1000, is_replacement=False)
    pool = open_pool(config, "instance-0", new_run_name(), block_bytes=1000, is_replacement=True)
    assert isinstance(pool, EmbeddedKVPool)
    pool.close()


@needs_mooncake
def test_a_master_that_is_not_there_is_told_by_the_setting():
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match=r"^kvpool\.mooncake_master: .*start_mooncake"):
        open_pool(
            mooncake_config(f"127.0.0.1:{port}"), "instance-0", new_run_name(), block_bytes=1000, is_replacement=False
        )


def test_a_buffer_that_holds_no_block_is_refused_before_anything_is_asked_of_mooncake():
    """A block with its header does not fit in as many MiB as it has itself."""
    config = mooncake_config("127.0.0.1:1", mooncake_buffer_mib=1)
    with pytest.raises(ConfigError, match=r"^kvpool\.mooncake_buffer_mib: is 1, .* 2097152 bytes.*at least 3"):
        open_pool(config, "instance-0", new_run_name(), block_bytes=2 << 20, is_replacement=False)
    page = dataclasses.replace(tiny.CONFIG, page_size=6000, num_pages=2)  # 192 bytes a token.
    with pytest.raises(ConfigError, match=r"^kvpool\.mooncake_buffer_mib: .* 1152000 bytes.*at least 2"):
        build_engine(dataclasses.replace(config, engine=page), tiny.MODEL, tiny.params(), instance_id=0)


def test_the_least_segment_is_mooncakes():
    assert MIN_MOONCAKE_SEGMENT_MIB << 20 == MIN_SEGMENT_BYTES


@needs_mooncake
def test_instances_of_a_run_share_and_runs_do_not():
    config = mooncake_config(shared_master().address, mooncake_segment_mib=16, mooncake_timeout_s=5.0)
    runs = [new_run_name(), new_run_name()]
    first, second, other = (
        open_pool(config, f"instance-{place}", run, block_bytes=1000, is_replacement=False)
        for place, run in enumerate((runs[0], runs[0], runs[1]))
    )
    put(first, range(3))
    assert get(second, range(3)) == [HIT] * 3
    assert get(other, range(3)) == [MISS] * 3
    for pool in (first, second, other):
        pool.close()


def roll_out(kvpool=None, kills=0, on_event=None):
    config = RunConfig(
        engine=dataclasses.replace(tiny.CONFIG, deterministic=True, num_pages=64),
        rollout=RolloutConfig(instances=2, chunk_size=8, prefetch_chunks=1),
        kvpool=kvpool or KVPoolConfig(),
        chaos=ChaosConfig(kill_instance=kills, seed=1),
    )
    cluster = build_local_cluster(config, tiny.MODEL, tiny.params())
    driver = RolloutDriver(make_policy("seer", config.rollout))
    runner = RolloutRunner(cluster, driver, chaos=config.chaos, on_event=on_event)
    stats = runner.run(tiny.groups(3, 4, SamplingParams(max_tokens=40, stop_token_ids=(1, 2), seed=5))).stats
    cluster.close()
    return stats


@needs_mooncake
def test_kv_in_mooncake_outlives_its_instance_and_a_dead_master_costs_re_prefills_only():
    expected, embedded = roll_out(), roll_out(kills=3)
    master = Master()
    lender = MooncakeKVPool(master.address, namespace="lender", segment_bytes=MIN_SEGMENT_BYTES)
    kvpool = KVPoolConfig(backend="mooncake", mooncake_master=master.address, move="always")
    shared = roll_out(kvpool, kills=3)
    assert shared.instances_lost == 3
    assert shared.re_prefilled_tokens < embedded.re_prefilled_tokens
    num_events = 0

    def kill_master(_, event, __):
        nonlocal num_events
        num_events += 1
        if num_events == 20:
            master.kill()

    # Those that take the place of the killed ones find no master.
    alone = roll_out(dataclasses.replace(kvpool, mooncake_timeout_s=0.5), kills=3, on_event=kill_master)
    assert num_events > 20 and alone.instances_lost == 3
    assert alone.re_prefilled_tokens > 0
    assert {stats.output_sha256 for stats in (embedded, shared, alone)} == {expected.output_sha256}
    lender.close()
