"""The engine as it runs on a TPU: rows of whole lanes, and the TPU kernel, in interpret mode, in place of plain XLA."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.grouped_matmul import api as experts_api
from kernels_pallas.mla_attention import api as attention_api
from kernels_pallas.mla_attention.pallas_tpu import mla_attention_pallas_tpu
from kernels_pallas.tree_verify import api as draw_api
from seer_jax.config.schema import ShardingConfig
from seer_jax.core.packing import pack
from seer_jax.core.step_shapes import StepShape
from seer_jax.engine import kv_blocks
from seer_jax.engine.step import make_step
from seer_jax.models import decoder
from seer_jax.sharding import MESH_AXES, make_mesh
from tests.engine import tiny
from tests.engine.test_engine import make_engine
from tests.engine.test_engine import test_chunk_continues_on_another_instance_without_prefill as move_between_instances
from tests.engine.test_speculation import make_engine as make_speculative_engine
from tests.engine.test_speculation import siblings


@pytest.fixture(autouse=True)
def padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches as wide as on a TPU."""
    pad_row_width = kv_blocks.pad_row_width
    monkeypatch.setattr(kv_blocks, "pad_row_width", lambda width, _: pad_row_width(width, "tpu"))


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """The TPU kernel serves; rows per tile of the calls traced so far, and whether they had trees.

    Programs of other tests are not reused, nor these by them.
    """
    calls, attend = [], partial(mla_attention_pallas_tpu, interpret=True)

    def record(q, cache, tables, limits, starts, masks, **options):
        calls.append((q.shape[1], masks is not None))
        return attend(q, cache, tables, limits, starts, masks, **options)

    monkeypatch.setitem(attention_api.IMPLEMENTATIONS, "xla", record)
    make_step.cache_clear()
    yield calls
    make_step.cache_clear()


def test_padded_kv_moves_between_instances() -> None:
    assert make_engine()._caches[0].shape[-1] == 128
    move_between_instances()


@pytest.mark.slow
def test_the_kernel_decodes_and_prefills_the_tokens_of_cacheless_decoding(attention_calls) -> None:
    engine = make_engine(page_size=8)
    chunks = [tiny.chunk(tiny.prompt(i, 3 + 6 * i), index=i, max_chunk=8, max_tokens=8) for i in range(3)]
    for chunk in chunks:
        engine.submit(chunk)
    tiny.check_against_reference(chunks, tiny.drain(engine))
    assert set(attention_calls) == {(1, False), (8, False)}


@pytest.mark.slow
def test_the_kernel_verifies_trees_to_the_tokens_of_cacheless_decoding(attention_calls) -> None:
    engine = make_speculative_engine("grouped_tree", verify_tile=3, page_size=8)
    chunks = siblings(3, max_chunk=16, max_tokens=16)
    for chunk in chunks:
        engine.submit(chunk)
    tiny.check_against_reference(chunks, tiny.drain(engine))
    assert (3, True) in attention_calls and engine.status().num_accepted_tokens > 0


def test_training_takes_plain_xla_for_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their TPU kernels have no gradient."""
    named, run = [], decoder.grouped_mlp

    def record(*arrays, implementation=None):
        named.append(implementation)
        return run(*arrays, implementation=implementation)

    monkeypatch.setattr(decoder, "grouped_mlp", record)
    jax.eval_shape(
        lambda params: decoder.forward_train(params, tiny.MODEL, jnp.zeros((1, 4), jnp.int32)), tiny.params()
    )
    assert set(named) == {"xla"}


def test_on_a_mesh_a_named_implementation_serves_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside `shard_map`, where each device has its heads and experts; the compiler partitions no kernel."""
    mesh = make_mesh(ShardingConfig(), jax.devices())
    manual = []
    for module in (attention_api, experts_api, draw_api):

        def record(*arrays, run=module.IMPLEMENTATIONS["xla"], **options):
            manual.append(jax.sharding.get_abstract_mesh().manual_axes)
            return run(*arrays, **options)

        monkeypatch.setitem(module.IMPLEMENTATIONS, "recorded", record)
    shape = StepShape(num_rows=1, num_tiles=0, tile=1, num_requests=1, num_pages=1)
    caches = [jnp.zeros((2, 16, tiny.MODEL.latent_width))] * tiny.MODEL.num_hidden_layers
    step = make_step.__wrapped__(tiny.MODEL, shape, max_steps=1, mesh=mesh, implementation="recorded")
    jax.eval_shape(step, tiny.params(), caches, jnp.asarray(pack([], [], shape, 1)))
    assert len(manual) >= 4  # Two layers of attention, one of experts, a draw.
    assert set(manual) == {MESH_AXES}
