"""The engine's own decode step compiles for whole models on slices of TPUs, kernels inside, within bounded memory.

Its collectives are counted in the compiled program, so also those that the partitioner adds.
"""

import dataclasses
from collections import Counter

import jax
import pytest

from tests.aot.deployments import (
    HBM,
    KIMI_K2,
    MOONLIGHT,
    OTHER_PROGRAMS,
    SLOTS,
    Deployment,
    check_kernels_and_memory,
    count_collectives,
    expected_collectives,
    with_layers,
)

pytestmark = [pytest.mark.aot, pytest.mark.timeout(1800)]

MOONLIGHT_STEP = Deployment(model=MOONLIGHT, topology="v6e:2x4", expert=8, tensor=1, context=8192, pages=2048)
KIMI_K2_STEP = Deployment(model=KIMI_K2, topology="v5p:4x4x4", expert=4, tensor=16, context=131_072, pages=2048)
"""131,072 tokens of KV at 78 KB each; the experts over all 64 chips, 6 a layer on each."""


def test_moonlight_on_eight_v6e_chips_sends_one_sum_per_moe_layer():
    text, compiled = MOONLIGHT_STEP.compile()
    check_kernels_and_memory(MOONLIGHT_STEP, text, compiled)
    assert count_collectives(compiled) == {("all-reduce", SLOTS * 2048 * 2): 26}


def test_moonlight_with_eight_ranks_has_an_eighth_of_the_cache_on_a_chip_and_exchanges_tokens():
    """Per MoE layer the ids and weights of all tokens, and each token there and back: 8 tokens to 8 chips at most."""
    ranks = dataclasses.replace(MOONLIGHT_STEP, data=8, expert=1)
    assert 8 * ranks.count_cache_bytes() == MOONLIGHT_STEP.count_cache_bytes() == 27 * 2048 * 64 * 640 * 2
    text, compiled = ranks.compile()
    check_kernels_and_memory(ranks, text, compiled)
    assert count_collectives(compiled) == {
        ("all-gather", SLOTS * 6 * 4): 2 * 26,
        ("ragged-all-to-all", SLOTS * 2048 * 2): 2 * 26,
        ("all-reduce", 4): 2,  # Whether any rank has finished, and whether any goes on.
    }


def test_ranks_with_tensor_parallelism_inside_divide_heads_and_not_tokens():
    """Over "tensor" the sums and permutes of `expected_collectives`, each of a rank's slots; the experts as above."""
    deployment = dataclasses.replace(with_layers(MOONLIGHT_STEP, 2), data=2, expert=1, tensor=4)
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
    exchanged = {("all-gather", SLOTS * 6 * 4): 2, ("ragged-all-to-all", SLOTS * 2048 * 2): 2, ("all-reduce", 4): 2}
    exchanged["all-gather", SLOTS // 2 * 2048 * 2] = 1  # What came back, to all chips of a rank.
    sums = expected_collectives(deployment)
    sums["all-reduce", SLOTS // 2 * 2048 * 2] -= 1  # The experts'.
    assert count_collectives(compiled) == sums + Counter(exchanged)


def test_three_layers_of_kimi_k2_on_64_v5p_chips_send_what_is_counted():
    deployment = with_layers(KIMI_K2_STEP, 3)
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
    assert count_collectives(compiled) == expected_collectives(deployment)


def test_kimi_k2_with_float8_experts_and_caches_has_half_of_their_bytes_and_sends_the_same():
    deployment = with_layers(KIMI_K2_STEP, 3)
    float8 = dataclasses.replace(deployment, is_float8=True)
    assert 2 * float8.count_cache_bytes() == deployment.count_cache_bytes()
    text, compiled = float8.compile()
    check_kernels_and_memory(float8, text, compiled)
    assert count_collectives(compiled) == expected_collectives(deployment)


@pytest.mark.slow
def test_all_of_kimi_k2_fits_64_v5p_chips():
    """61 layers, one after the other: two minutes of two cores."""
    text, compiled = KIMI_K2_STEP.compile()
    check_kernels_and_memory(KIMI_K2_STEP, text, compiled)
    assert count_collectives(compiled) == expected_collectives(KIMI_K2_STEP)


def test_more_than_a_chip_holds_is_refused_so_the_limit_is_enforced():
    too_large = dataclasses.replace(with_layers(MOONLIGHT_STEP, 2), pages=200_000)
    assert too_large.count_argument_bytes() > HBM["v6e"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        too_large.compile()


@pytest.mark.parametrize("program", OTHER_PROGRAMS)
def test_the_other_programs_of_an_engine_compile_too(program):
    """Not their collectives: jaxlib cannot read what libtpu writes of some asynchronous operations."""
    deployment = dataclasses.replace(with_layers(MOONLIGHT_STEP, 2), program=OTHER_PROGRAMS[program])
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
