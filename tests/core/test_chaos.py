"""Faults come as often as asked for, and the same for the same seed."""

import pytest

from seer_jax.config.schema import ChaosConfig, RolloutConfig, RunConfig
from seer_jax.config.validate import validate
from seer_jax.core.chaos import Chaos, delay_s
from seer_jax.core.errors import ConfigError
from seer_jax.core.placement import InstanceLoad
from tests.core.fake_cluster import make_info
from tests.engine import tiny


def victims(seed: int, count: int, num_requests: int = 50) -> list[tuple[int, int]]:
    """(Requests finished by then, instance) of all kills, with nine instances, the last of which is idle."""
    loads = {i: InstanceLoad(info=make_info(i, num_total_pages=50, max_model_len=96)) for i in range(9)}
    for i in range(8):
        loads[i].add(tiny.chunk(tiny.prompt(0, 4)))
    chaos = Chaos(ChaosConfig(kill_instance=count, seed=seed))
    chaos.start(num_requests)
    return [(done, victim) for done in range(num_requests) for victim in chaos.victims(done, loads)]


def test_as_many_busy_instances_are_killed_as_asked_for_and_early_enough():
    assert victims(0, 0) == []
    kills = victims(3, 5)
    # Nobody twice, though the loads still show them: their loss has not been noticed here.
    assert len(kills) == len({victim for _, victim in kills}) == 5 and all(victim < 8 for _, victim in kills)
    assert max(done for done, _ in kills) < 50


def test_the_seed_decides():
    assert victims(1, 4) == victims(1, 4) != victims(2, 4)


def test_as_many_pool_owners_are_killed_as_asked_for():
    chaos = Chaos(ChaosConfig(kill_pool_owner=3, seed=3))
    chaos.start(50)
    moments = [done for done in range(50) for _ in range(2) if chaos.kills_pool_owner(done)]
    assert len(moments) == 3 and not chaos.kills_pool_owner(50)


def test_messages_are_dropped_at_the_rate_asked_for():
    chaos = Chaos(ChaosConfig(drop_message=0.25))
    assert 200 < sum(chaos.drops_message() for _ in range(1000)) < 300
    assert not any(Chaos(ChaosConfig()).drops_message() for _ in range(100))


def test_only_the_first_instance_is_slow():
    config = ChaosConfig(slow_instance=4.0)
    assert delay_s(config, 0, 0.5) == 1.5 and delay_s(config, 1, 0.5) == 0.0


@pytest.mark.parametrize(
    ("chaos", "field"),
    [
        ({"kill_instance": -1}, "chaos.kill_instance"),
        ({"kill_pool_owner": -1}, "chaos.kill_pool_owner"),
        ({"kill_pool_owner": 1}, "chaos.kill_pool_owner"),
        ({"drop_message": 1.0}, "chaos.drop_message"),
        ({"drop_message": 0.1}, "chaos.drop_message"),
        ({"slow_instance": 0.5}, "chaos.slow_instance"),
    ],
)
def test_faults_that_cannot_be_are_refused(chaos, field):
    config = RunConfig(chaos=ChaosConfig(**chaos), rollout=RolloutConfig(runtime="local"))
    with pytest.raises(ConfigError, match=field):
        validate(config, training=False)
