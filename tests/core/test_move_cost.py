"""KV is moved or computed again, whichever was measured to be faster."""

import pytest

from seer_jax.core.move_cost import MAX_DECLINED, LinearCost, MoveCosts


def test_a_fixed_part_and_a_part_per_unit_are_found():
    cost = LinearCost()
    assert cost.estimate(10) is None
    cost.note(100, 3.0)
    assert (cost.estimate(100), cost.estimate(50), cost.estimate(200)) == pytest.approx((3.0, 3.0, 6.0))
    for size in (200, 50, 400, 100):
        cost.note(size, 1.0 + 0.02 * size)
    assert cost.estimate(1000) == pytest.approx(21.0)
    assert cost.estimate(0) == pytest.approx(1.0)


def test_what_was_measured_last_counts_most():
    cost = LinearCost()
    for seconds in (10.0, 1.0):
        for _ in range(60):
            cost.note(100, seconds)
            cost.note(50, seconds)
    assert cost.estimate(100) == pytest.approx(1.0, rel=0.05)


def test_no_estimate_is_negative_or_falls_with_the_size():
    cost = LinearCost()
    for size, seconds in ((100, 1.0), (200, 0.5), (400, 0.1)):
        cost.note(size, seconds)
    assert 0 < cost.estimate(1) <= cost.estimate(1000)


def make_costs(move_s: float, step_s: float, *, always_moves: bool = False) -> MoveCosts:
    """Moves that take `move_s` per megabyte, steps that prefill 100 tokens in `step_s`."""
    costs = MoveCosts(100, always_moves=always_moves)
    for share in (1, 2):
        costs.move.note(share * 500_000, share * move_s / 2)
        costs.prefill.note(share * 50, step_s)
    return costs


def test_the_cheaper_way_is_taken():
    assert MoveCosts(100, always_moves=False).moving_pays(10, 10)
    costs = make_costs(move_s=1.0, step_s=0.3)
    # 250 tokens are three steps, 0.9 s.
    assert costs.moving_pays(250, 800_000)
    assert not costs.moving_pays(250, 1_000_000) and not costs.moving_pays(100, 800_000)
    assert costs.num_declined == 2
    assert make_costs(move_s=1.0, step_s=0.3, always_moves=True).moving_pays(100, 10**9)


def test_what_seems_dear_is_tried_again_now_and_then():
    costs = make_costs(move_s=1.0, step_s=0.1)
    pays = [costs.moving_pays(100, 1_000_000) for _ in range(2 * MAX_DECLINED + 2)]
    assert [i for i, moved in enumerate(pays) if moved] == [MAX_DECLINED, 2 * MAX_DECLINED + 1]


def test_an_answer_that_replaces_a_no_counts_instead_of_it():
    costs = make_costs(move_s=1.0, step_s=0.1)
    assert not costs.moving_pays(100, 1_000_000)
    for _ in range(MAX_DECLINED + 1):
        assert not costs.moving_pays(100, 2_000_000, was_declined=True)
    assert costs.num_declined == 1
    assert costs.moving_pays(1000, 500_000, was_declined=True) and costs.num_declined == 0
