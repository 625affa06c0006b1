"""Step times against bytes and operations counted by hand."""

import numpy as np
import pytest

from seer_jax.core.latency import StepTimeModel
from seer_jax.sim.hardware import CHIPS, Chip
from seer_jax.sim.roofline import RooflineStepTimes

CHIP = Chip(name="toy", memory_bytes=1e9, memory_bytes_per_s=1000.0, flops_per_s=1e5, fp8_flops_per_s=2e5)


def times(**changes) -> RooflineStepTimes:
    """100 dense and 300 expert parameters (4 experts, of which a token meets 1) on two chips, two ranks."""
    values = dict(
        chip=CHIP,
        num_chips=2,
        num_ranks=2,
        parameters=400.0,
        active_parameters=175.0,
        expert_share=0.75,
        num_experts=4,
        experts_per_token=1,
        bytes_per_parameter=2.0,
        kv_bytes_per_token=10.0,
        attention_ops_per_pair=6.0,
        prefill_attention_ops_per_pair=4.0,
        memory_efficiency=0.5,
        compute_efficiency=0.25,
        prefill_efficiency=0.25,
        step_overhead_s=0.125,
        draft_overhead_s=0.5,
        draft_overhead_per_token_s=0.25,
    )
    return RooflineStepTimes(**{**values, **changes})


def test_it_is_a_step_time_model():
    assert isinstance(times(), StepTimeModel)


def test_a_step_bound_by_memory_takes_what_its_bytes_take():
    # Dense weights: 100 x 2 bytes, a copy on each of 2 ranks: 400. Two tokens leave (3/4)^2 of the experts alone:
    # 600 x 7/16 = 262.5. KV: 2 x 30 x 10 = 600. Together over 2 chips x 1000 x 0.5.
    assert times().plain_step_s(2, 30.0) == pytest.approx(0.125 + (400 + 262.5 + 600) / 1000)
    # Tensor parallelism: the dense weights are there once.
    assert times(num_ranks=1).plain_step_s(2, 30.0) == pytest.approx(0.125 + (200 + 262.5 + 600) / 1000)


def test_a_step_bound_by_compute_takes_what_its_operations_take():
    # 1000 tokens x (2 x 175 + 6 x 2 tokens of context) operations over 2 chips x 1e5 x 0.25: 7.24 s. Bytes: 1.5 s.
    model = times(memory_efficiency=1.0, kv_bytes_per_token=1.0)
    assert model.plain_step_s(1000, 2.0) == pytest.approx(0.125 + 1000 * (350 + 12) / 5e4)
    # fp8 weights: twice the rate for them, not for attention.
    fp8 = times(memory_efficiency=1.0, kv_bytes_per_token=1.0, bytes_per_parameter=1.0)
    assert fp8.plain_step_s(1000, 2.0) == pytest.approx(0.125 + 1000 * (350 / 1e5 + 12 / 5e4))


def test_verification_reads_the_context_once_and_pays_for_its_drafts():
    # 2 requests of 3 tokens: (3/4)^6 of the experts untouched; 4 draft tokens.
    memory_s = (400 + 600 * (1 - 0.75**6) + 600) / 1000
    assert times().verify_step_s(2, 6, 30.0) == pytest.approx(0.125 + memory_s + 0.5 + 4 * 0.25)
    assert times().verify_step_s(2, 2, 30.0) == times().plain_step_s(2, 30.0) + 0.5


def test_an_array_of_tokens_gets_the_times_of_its_elements():
    model, tokens = times(), np.array([3, 10, 100, 100_000])
    together = model.verify_step_s(3, tokens, 20.0)
    assert together.dtype == np.float64
    assert together == pytest.approx([model.verify_step_s(3, int(token), 20.0) for token in tokens])


def test_more_of_anything_is_never_faster():
    model = times()
    by_batch = [model.plain_step_s(batch, 50.0) for batch in range(1, 400)]
    by_context = [model.plain_step_s(4, float(context)) for context in range(1, 400)]
    by_tokens = [model.verify_step_s(4, tokens, 50.0) for tokens in range(4, 400)]
    for seconds in (by_batch, by_context, by_tokens):
        assert (np.diff(seconds) > 0).all()


def test_prefill_counts_every_pair_of_tokens_once():
    # Tokens 3, 4 after 2 earlier ones see 3 and 4 tokens: 7 pairs.
    model = times()
    assert model.prefill_s(2, start=2) == pytest.approx((2 * 350 + 7 * 4) / 5e4)
    assert model.prefill_s(10) == pytest.approx(model.prefill_s(4) + model.prefill_s(6, start=4))


def test_a_dense_model_has_no_experts_to_read():
    dense = times(expert_share=0.0, num_experts=0, experts_per_token=0)
    assert dense.plain_step_s(1, 0.0) == pytest.approx(0.125 + 400 * 2 * 2 / 1000)


def test_a_draft_model_is_split_like_the_dense_part():
    assert times(num_ranks=1).pass_s(1, parameters=50.0, kv_bytes=100.0) == pytest.approx((100 + 100) / 1000)
    assert times().pass_s(1, parameters=50.0, kv_bytes=100.0) == pytest.approx((200 + 100) / 1000)
    assert times().pass_s(1000, parameters=50.0, kv_bytes=0.0) == pytest.approx(2 * 50 * 1000 / 5e4)


def test_chips_are_named_as_they_are_listed():
    assert all(name == chip.name for name, chip in CHIPS.items())
    assert {"h800", "h200", "h100", "tpu_v5p", "tpu_v6e", "tpu_v5e"} == set(CHIPS)
