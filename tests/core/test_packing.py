"""Packed step inputs: what goes in comes out, and every plan has a bucket."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.config.schema import EngineConfig, SpeculationConfig
from seer_jax.core import packing
from seer_jax.core.draft.speculate import DraftBatch
from seer_jax.core.packing import Run, draft_runs, pack, packed_size, plan_runs, unpack_outputs, views
from seer_jax.core.sequence import Sequence
from seer_jax.core.step_plan import PrefillSlice, StepPlan
from seer_jax.core.step_shapes import StepBuckets, StepShape, truncates
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


def make_batch(parents: list[list[int]]) -> DraftBatch:
    """Drafts with tokens 100, 101, ... and these parents."""
    batch = DraftBatch.empty(len(parents), max(map(len, parents)))
    for i, row in enumerate(parents):
        batch.parents[i, : len(row)] = row
        batch.token_ids[i, : len(row)] = 100 + np.arange(len(row))
        batch.num_nodes[i] = len(row)
    return batch


def test_packed_fields_read_back_exactly() -> None:
    key = 0x89ABCDEF_12345678
    sampling = SamplingParams(max_tokens=30, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(3, 4))
    sequence = make_sequence(9, sampling, key)
    sequence.pages = [11, 12, 13]
    shape = StepShape(num_requests=3, num_rows=2, num_tiles=2, tile=4, num_pages=2)
    row = Run(sequence=sequence, start=8, token_ids=sequence.token_ids[8:9], samples=True)
    piece = Run(sequence=sequence, start=2, token_ids=sequence.token_ids[2:7], samples=False)
    packed = pack([row], [piece], shape, num_steps=6)
    assert packed.shape == (packed_size(shape),) and packed[0] == 6
    requests, tokens, last_tokens = views(packed, shape)
    assert requests[:, packing.FIRST_POSITION].tolist() == [8, 2, 0]
    line = requests[0]
    assert line[packing.REMAINING] == 20 and line[packing.TOP_K] == 5
    assert list(line[packing.KEY_LOW : packing.KEY_HIGH + 1].view(np.uint32)) == [0x12345678, 0x89ABCDEF]
    assert line[packing.TEMPERATURE].view(np.float32) == np.float32(0.7)
    assert line[packing.TOP_P].view(np.float32) == np.float32(0.9)
    assert list(line[packing.STOP_IDS : packing.NUM_FIELDS]) == [3, 4, -1, -1]
    assert list(line[packing.NUM_FIELDS :]) == [11, 12]
    assert not requests[2, packing.NUM_FIELDS :].any()
    # One row and its padding, then a slice of five tokens in two tiles of four.
    assert tokens[:, packing.LIMIT].tolist() == [1, 0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert tokens[:, packing.TOKEN].tolist() == [18, 0, 12, 13, 14, 15, 16, 0, 0, 0]
    assert tokens[2:7, packing.OFFSET].tolist() == tokens[2:7, packing.DEPTH].tolist() == [0, 1, 2, 3, 4]
    assert tokens[:7, packing.REQUEST].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert tokens[:, packing.COLUMN].tolist() == [0] + 9 * [-1] and (tokens[:, packing.PARENT] == -1).all()
    assert last_tokens.tolist() == [0, -1, -1]


def test_only_the_slice_that_ends_at_the_newest_token_samples() -> None:
    sequence = make_sequence(11)
    for start, count, samples in ((0, 5, False), (5, 6, True)):
        plan = StepPlan(decodes=[], prefills=[PrefillSlice(sequence=sequence, start=start, count=count)], num_steps=1)
        rows, (run,) = plan_runs(plan)
        assert rows == [] and (run.start, len(run.token_ids), run.samples) == (start, count, samples)


def test_nodes_of_a_tree_know_their_place_their_depth_and_their_ancestors() -> None:
    sequences = [make_sequence(9), make_sequence(4)]
    batch = make_batch([[-1, 0, -1, 1, 2], [-1]])
    shape = StepShape(num_requests=2, num_rows=8, num_tiles=0, tile=4, num_pages=2, max_depth=4, has_trees=True)
    packed = pack(draft_runs(sequences, batch, np.array([5, 1])), [], shape, 1)
    requests, tokens, _ = views(packed, shape)
    assert requests[:, packing.FIRST_POSITION].tolist() == [8, 3]
    assert tokens[:, packing.TOKEN].tolist() == [18, 100, 101, 102, 103, 104, 13, 100]
    assert tokens[:, packing.OFFSET].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert tokens[:, packing.DEPTH].tolist() == tokens[:, packing.COLUMN].tolist() == [0, 1, 2, 1, 3, 2, 0, 1]
    assert tokens[:, packing.PARENT].tolist() == [-1, 0, 1, 0, 2, 3, -1, 6]
    assert tokens[:, packing.LIMIT].tolist() == 8 * [1]
    assert tokens[:, packing.MASK].tolist() == [0, 0b1, 0b11, 0b100, 0b1011, 0b10100, 0, 0b1]


def test_a_line_needs_no_mask_and_only_the_chosen_nodes_are_packed() -> None:
    batch = make_batch([[-1, 0, 1, 2]])
    shape = StepShape(num_requests=1, num_rows=0, num_tiles=2, tile=2, num_pages=2, max_depth=4)
    packed = pack([], draft_runs([make_sequence(9)], batch, np.array([2])), shape, 1)
    _, tokens, _ = views(packed, shape)
    assert tokens[:, packing.LIMIT].tolist() == [1, 2, 3, 0] and not tokens[:, packing.MASK].any()
    assert tokens[:, packing.PARENT].tolist() == [-1, 0, 1, -1]


def test_the_last_of_32_nodes_has_the_highest_bit() -> None:
    batch = make_batch([list(range(-1, 31))])
    shape = StepShape(num_requests=1, num_rows=33, num_tiles=0, tile=1, num_pages=2, max_depth=32, has_trees=True)
    _, tokens, _ = views(pack(draft_runs([make_sequence(9)], batch, np.array([32])), [], shape, 1), shape)
    assert tokens[32, packing.MASK] == -1 and tokens[32, packing.DEPTH] == 32


def test_outputs_unpack_to_what_each_request_said() -> None:
    logprobs = np.array([[-0.5, -1.5], [-2.0, 0.0]], np.float32).view(np.int32)
    table = np.concatenate([[[2], [1]], [[7, 8], [9, 0]], logprobs], axis=1).astype(np.int32)
    shape = StepShape(num_requests=2, num_rows=2, num_tiles=0, tile=1, num_pages=1)
    steps, emitted = unpack_outputs(np.concatenate([[3], table.reshape(-1)]).astype(np.int32), shape)
    assert steps == 3 and all(new.expert_ids is None for new in emitted)
    said = [(new.token_ids.tolist(), new.logprobs.tolist()) for new in emitted]
    assert said == [([7, 8], [-0.5, -1.5]), ([9], [-2.0])]


def test_expert_ids_are_two_to_a_word_and_the_odd_half_is_dropped() -> None:
    ids = np.arange(2 * 2 * 3, dtype=np.int16).reshape(2, 2, 3) + 300  # [request, column, 3 of one layer]
    words = np.pad(ids, ((0, 0), (0, 0), (0, 1))).view(np.int32).reshape(2, -1)
    table = np.concatenate([[[2], [1]], [[7, 8], [9, 0]], np.zeros((2, 2), np.int32), words], axis=1).astype(np.int32)
    shape = StepShape(num_requests=2, num_rows=2, num_tiles=0, tile=1, num_pages=1, expert_ids=(1, 3))
    _, emitted = unpack_outputs(np.concatenate([[1], table.reshape(-1)]).astype(np.int32), shape)
    assert [new.expert_ids.tolist() for new in emitted] == [ids[0, :, None].tolist(), ids[1, :1, None].tolist()]
    assert emitted[0].token_ids.tolist() == [7, 8] and emitted[0].expert_ids.dtype == np.int16


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
    buckets = StepBuckets(config, SpeculationConfig())
    lengths, budget = [], buckets.max_prefill_tokens
    num_rows = data.draw(st.integers(0, max_num_seqs))
    while budget > 0 and len(lengths) < max_num_seqs - num_rows:
        lengths.append(data.draw(st.integers(1, budget)))
        budget -= -(-lengths[-1] // buckets.tile) * buckets.tile
    shape = buckets.pick(num_rows, lengths, False)
    assert shape in buckets.all_shapes(truncates=False)
    assert shape.num_requests >= num_rows + len(lengths)
    assert shape.num_rows >= num_rows and shape.num_tokens >= num_rows + sum(lengths)
    assert shape.num_pages * page_size >= max_model_len


@given(st.integers(1, 20), st.integers(1, 32), st.integers(1, 5), st.booleans(), st.data())
def test_every_draft_that_has_room_has_a_compiled_shape(
    max_num_seqs: int, max_draft_tokens: int, tile: int, deterministic: bool, data: st.DataObject
) -> None:
    config = EngineConfig(max_num_seqs=max_num_seqs, max_prefill_tokens=32, deterministic=deterministic)
    buckets = StepBuckets(config, SpeculationConfig(mode="grouped_tree", max_draft_tokens=max_draft_tokens), tile)
    count = data.draw(st.integers(1, max_num_seqs))
    tiles, parents = buckets.max_verify_tokens // buckets.verify_tile, []
    for left in reversed(range(count)):
        longest = min((tiles - left) * buckets.verify_tile - 1, max_draft_tokens)
        parents.append(list(range(-1, data.draw(st.integers(0, longest)) - 1)))
        tiles -= -(-(1 + len(parents[-1])) // buckets.verify_tile)
    batch = make_batch([*parents, [-1]])
    runs = draft_runs([make_sequence(9)] * count, batch, batch.num_nodes[:count])
    shape = buckets.pick_verify((len(run.token_ids) for run in runs), False)
    assert shape in buckets.all_shapes(truncates=False)
    packed = pack([], runs, shape, 1) if shape.num_tiles else pack(runs, [], shape, 1)
    _, tokens, _ = views(packed, shape)
    assert (tokens[:, packing.LIMIT] > 0).sum() == count + sum(map(len, parents))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_off_grouped_and_suffix_share_the_one_program_of_the_deterministic_mode(num_ranks: int) -> None:
    config = EngineConfig(deterministic=True)
    modes = [SpeculationConfig(mode=mode) for mode in ("off", "suffix", "grouped")]
    shapes = [StepBuckets(config, mode, num_ranks=num_ranks).all_shapes(False) for mode in modes]
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 1


def test_truncating_requests_get_their_own_program() -> None:
    assert [truncates(SamplingParams(max_tokens=3, **s)) for s in ({}, {"top_k": 3}, {"top_p": 0.9})] == [0, 1, 1]
    buckets = StepBuckets(EngineConfig(), SpeculationConfig())
    shape = buckets.pick(1, [], True)
    assert shape.truncates and shape in buckets.all_shapes(truncates=True)
