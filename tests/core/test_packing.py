"""Packed step inputs: what goes in comes out, and every plan has a bucket."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.config.schema import EngineConfig
from seer_jax.core import packing
from seer_jax.core.batching import PrefillSlice, StepPlan
from seer_jax.core.packing import Entry, StepBuckets, StepShape, pack, split_drafts, split_entries
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams


def make_sequence(num_tokens: int, sampling: SamplingParams | None = None, key: int = 0) -> Sequence:
    chunk = RequestChunk(
        request_id=RequestId(0, 0),
        chunk_index=0,
        token_ids=np.arange(num_tokens, dtype=np.int32) + 10,
        num_prompt_tokens=num_tokens,
        max_chunk_tokens=20,
        max_total_tokens=num_tokens + 30,
        num_reserved_pages=1,
        policy_version=0,
        priority=0,
        sampling=sampling or SamplingParams(max_tokens=30),
        sampling_key=key,
    )
    return Sequence(chunk, 0)


def test_packed_fields_read_back_exactly() -> None:
    key = 0x89ABCDEF_12345678
    sampling = SamplingParams(max_tokens=30, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(3, 4))
    sequence = make_sequence(9, sampling, key)
    sequence.pages = [11, 12, 13]
    shape = StepShape(num_rows=2, num_tiles=1, tile=4, num_pages=2)
    tile = Entry(sequence=sequence, start=4, token_ids=sequence.token_ids[4:7], sample=False)
    row = Entry(sequence=sequence, start=8, token_ids=sequence.token_ids[8:9], sample=True)
    packed = pack([row], [tile], shape, num_steps=6)
    assert packed.shape == (shape.packed_size,) and packed[0] == 6
    table = packed[1 : 1 + 3 * (packing.NUM_FIELDS + 2)].reshape(3, -1)
    row, padding, piece = table
    assert list(row[[packing.FIRST_POSITION, packing.COUNT, packing.SAMPLE]]) == [8, 1, 1]
    assert row[packing.REMAINING] == 20 and row[packing.TOP_K] == 5
    assert list(row[packing.KEY_LOW : packing.KEY_HIGH + 1].view(np.uint32)) == [0x12345678, 0x89ABCDEF]
    assert row[packing.TEMPERATURE].view(np.float32) == np.float32(0.7)
    assert row[packing.TOP_P].view(np.float32) == np.float32(0.9)
    assert list(row[packing.STOP_IDS : packing.NUM_FIELDS]) == [3, 4, -1, -1]
    assert list(row[packing.NUM_FIELDS :]) == [11, 12]
    assert padding[packing.COUNT] == 0 and not padding[packing.NUM_FIELDS :].any()
    assert list(piece[[packing.FIRST_POSITION, packing.COUNT, packing.SAMPLE]]) == [4, 3, 0]
    assert list(packed[-6:]) == [18, 0, 14, 15, 16, 0]


def test_only_the_tile_that_ends_at_the_newest_token_samples() -> None:
    sequence = make_sequence(11)
    plan = StepPlan(decodes=[], prefills=[PrefillSlice(sequence=sequence, start=0, count=11)], num_steps=1)
    rows, tiles = split_entries(plan, 4)
    assert rows == [] and [(t.start, t.count, t.sample) for t in tiles] == [(0, 4, False), (4, 4, False), (8, 3, True)]


def test_deterministic_mode_makes_every_prefill_token_a_row() -> None:
    sequence = make_sequence(3)
    plan = StepPlan(decodes=[], prefills=[PrefillSlice(sequence=sequence, start=0, count=3)], num_steps=1)
    rows, tiles = split_entries(plan, 1)
    assert tiles == [] and [(r.start, r.count, r.sample) for r in rows] == [(0, 1, False), (1, 1, False), (2, 1, True)]


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(20, 900),
    st.integers(1, 300),
    st.integers(1, 32),
    st.booleans(),
    st.data(),
)
def test_every_possible_plan_has_a_compiled_shape(
    max_num_seqs: int,
    page_size: int,
    max_model_len: int,
    prefill: int,
    tile: int,
    deterministic: bool,
    data: st.DataObject,
) -> None:
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        max_model_len=max_model_len,
        max_prefill_tokens=prefill,
        prefill_tile=tile,
        deterministic=deterministic,
    )
    buckets = StepBuckets(config)
    sequence = make_sequence(data.draw(st.integers(1, max_model_len)))

    num_tiles = data.draw(st.integers(0, 0 if deterministic else buckets.max_prefill_tokens // buckets.tile))
    extra_rows = buckets.max_prefill_tokens if deterministic else 0
    num_rows = data.draw(st.integers(0 if num_tiles else 1, max_num_seqs + extra_rows))
    (row,), _ = split_drafts([sequence], [np.zeros(0, np.int32)], as_rows=True)
    shape = buckets.pick([row] * num_rows, [row] * num_tiles)
    assert shape in buckets.all_shapes(truncates=False)
    assert shape.num_rows >= num_rows and shape.num_tiles >= num_tiles
    assert shape.num_pages * page_size >= max_model_len


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_draft_has_a_compiled_shape(deterministic: bool) -> None:
    buckets = StepBuckets(EngineConfig(max_num_seqs=5, max_prefill_tokens=32, deterministic=deterministic), 7)
    sequence = make_sequence(9)
    for count in range(1, 6):
        longest = min(7, buckets.max_verify_tokens // count - 1)
        for lengths in ([longest] * count, [0] * (count - 1) + [longest], [0] * count):
            drafts = [np.arange(length, dtype=np.int32) for length in lengths]
            rows, tiles = split_drafts([sequence] * count, drafts, as_rows=deterministic)
            shape = buckets.pick_verify(rows, tiles)
            assert shape in buckets.all_shapes(truncates=False)
            packed = pack(rows, tiles, shape, 1)
            tokens = packed[len(packed) - shape.num_tokens :].reshape(-1, shape.tile)
            newest = sequence.token_ids[8]
            expected = [[newest, *draft] for draft in drafts]
            if deterministic:
                assert tokens[: len(rows), 0].tolist() == [token for run in expected for token in run]
            else:
                assert [tokens[i, : len(run)].tolist() for i, run in enumerate(expected)] == expected
            assert len(rows) <= shape.num_rows and len(tiles) <= shape.num_tiles


def test_truncating_requests_get_their_own_program() -> None:
    buckets = StepBuckets(EngineConfig())
    sequence = make_sequence(5, SamplingParams(max_tokens=30, top_k=3))
    (row,), _ = split_drafts([sequence], [np.zeros(0, np.int32)], as_rows=True)
    shape = buckets.pick([row], [])
    assert shape.truncates and shape in buckets.all_shapes(truncates=True)
