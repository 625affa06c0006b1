"""Claims about group advantages."""

import numpy as np
import pytest

from seer_jax.train.advantages import STD_EPSILON, group_advantages

REWARDS = np.array([1.0, 0.0, 0.5, 2.0, 0.0, 1.0])
GROUPS = np.array([7, 3, 7, 7, 3, 3])


def test_grpo_normalises_every_group_by_its_own_mean_and_std():
    values, weights = group_advantages(REWARDS, GROUPS, "grpo")
    for group_id in (3, 7):
        rewards = REWARDS[group_id == GROUPS]
        expected = (rewards - rewards.mean()) / (np.sqrt(((rewards - rewards.mean()) ** 2).mean()) + STD_EPSILON)
        np.testing.assert_allclose(values[group_id == GROUPS], expected, rtol=1e-6)
    assert weights.tolist() == [1.0] * 6


@pytest.mark.parametrize("loss", ["dr_grpo", "k15"])
def test_dr_grpo_and_k15_only_subtract_the_mean(loss):
    values, _ = group_advantages(REWARDS, GROUPS, loss)
    np.testing.assert_allclose(values[GROUPS == 3], [-1 / 3, -1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "k15"])
def test_failed_rewards_change_nothing_for_their_siblings_and_weigh_nothing(loss):
    with_failure = group_advantages(np.append(REWARDS, np.nan), np.append(GROUPS, 7), loss)
    without = group_advantages(REWARDS, GROUPS, loss)
    np.testing.assert_array_equal(with_failure.values[:-1], without.values)
    assert with_failure.weights.tolist() == [1.0] * 6 + [0.0]
    assert with_failure.values[-1] == 0.0


def test_a_group_with_one_known_reward_or_none_gets_zeros():
    rewards = np.array([3.0, np.nan, np.nan, np.nan, 1.0, 0.0])
    values, weights = group_advantages(rewards, np.array([0, 0, 1, 1, 2, 2]), "grpo")
    assert values[:4].tolist() == [0.0] * 4
    assert weights.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert values[4] > 0.9 > -0.9 > values[5]


def test_equal_rewards_give_no_signal_in_spite_of_rounding():
    values, _ = group_advantages(np.full(7, 0.1), np.zeros(7, int), "grpo")
    assert np.abs(values).max() < 1e-9
