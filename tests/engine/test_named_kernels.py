"""`engine.kernels` names what computes attention, experts and draws."""

import dataclasses
from collections import Counter

import pytest

from kernels_pallas._dispatch import check_served
from kernels_pallas.grouped_matmul import api as experts_api
from kernels_pallas.mla_attention import api as attention_api
from kernels_pallas.tree_verify import api as draw_api
from seer_jax.core.errors import ConfigError
from seer_jax.engine.engine import Engine
from seer_jax.engine.step import make_step
from tests.engine import tiny

APIS = {"mla_attention": attention_api, "grouped_mlp": experts_api, "tree_verify": draw_api}


@pytest.fixture
def new_programs():
    """Programs of other tests are not reused, nor these by them."""
    make_step.cache_clear()
    yield
    make_step.cache_clear()


def make_engine(kernels: str) -> Engine:
    return Engine(tiny.MODEL, tiny.params(), dataclasses.replace(tiny.CONFIG, kernels=kernels))


def test_what_is_named_serves_all_three_operations(new_programs, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Counter()
    for operation, api in APIS.items():

        def record(*arrays, operation=operation, run=api.IMPLEMENTATIONS["reference"], **options):
            traced[operation] += 1
            return run(*arrays, **options)

        def refuse(*_, **__):
            raise AssertionError("another implementation was named")

        monkeypatch.setitem(api.IMPLEMENTATIONS, "reference", record)
        monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", refuse)
    engine = make_engine("reference")
    chunks = [tiny.chunk(tiny.prompt(i, 3 + 6 * i), index=i, max_chunk=8, max_tokens=8) for i in range(3)]
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    monkeypatch.undo()
    assert set(traced) == set(APIS)
    tiny.check_against_reference(chunks, results)


@pytest.mark.parametrize("kernels", ["pallas_gpu", "pallas_tpu"])
def test_kernels_of_another_platform_are_refused_at_once(kernels: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.kernels: {kernels} does not run on a cpu \(give auto or xla\)"):
        make_engine(kernels)


@pytest.mark.parametrize("operation", APIS)
def test_a_named_kernel_that_cannot_serve_is_refused_before_the_first_token(
    new_programs, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def refuse(*_, **__):
        check_served(operation, "reference", "tokens are float32, not bfloat16")

    monkeypatch.setitem(APIS[operation].IMPLEMENTATIONS, "reference", refuse)
    engine = make_engine("reference")
    with pytest.raises(
        ConfigError, match=rf"engine\.kernels: {operation}: reference .* float32, not bfloat16 \(mend that, or give"
    ):
        engine.warmup()
