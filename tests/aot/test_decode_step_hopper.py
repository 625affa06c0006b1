"""The engine's own decode step compiles for eight H200s, Hopper kernels inside (`engine.kernels: pallas_gpu`)."""

import dataclasses

import pytest

from tests.aot.deployments import (
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

MOONLIGHT_STEP = Deployment(model=MOONLIGHT, topology="h200", expert=8, tensor=1, context=8192, pages=2048)
KIMI_K2_STEP = Deployment(model=KIMI_K2, topology="h200", expert=2, tensor=4, context=131_072, pages=2048)


def test_moonlight_sends_one_sum_per_moe_layer():
    text, compiled = MOONLIGHT_STEP.compile()
    check_kernels_and_memory(MOONLIGHT_STEP, text, compiled)
    assert count_collectives(compiled) == {("all-reduce", SLOTS * 2048 * 2): 26}


def test_moonlight_with_eight_ranks_exchanges_tokens():
    """As on TPUs, but ids and weights are gathered together; that one names its source, an eighth, too."""
    ranks = dataclasses.replace(MOONLIGHT_STEP, data=8, expert=1)
    text, compiled = ranks.compile()
    check_kernels_and_memory(ranks, text, compiled)
    assert count_collectives(compiled) == {
        ("all-gather", 2 * SLOTS * 6 * 4 * 9 // 8): 26,
        ("ragged-all-to-all", SLOTS * 2048 * 2): 2 * 26,
        ("all-reduce", 4): 2,
    }


@pytest.mark.parametrize("is_float8", [False, True], ids=["bfloat16", "float8"])
def test_layers_of_kimi_k2_send_what_is_counted(is_float8):
    deployment = dataclasses.replace(with_layers(KIMI_K2_STEP, 3), is_float8=is_float8)
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
    assert count_collectives(compiled) == expected_collectives(deployment)


@pytest.mark.parametrize("program", OTHER_PROGRAMS)
def test_the_other_programs_of_an_engine_compile_too(program):
    deployment = dataclasses.replace(with_layers(MOONLIGHT_STEP, 2), program=OTHER_PROGRAMS[program])
    text, compiled = deployment.compile()
    check_kernels_and_memory(deployment, text, compiled)
    assert count_collectives(compiled) == {("all-reduce", deployment.shape.num_tokens * 2048 * 2): 1}
