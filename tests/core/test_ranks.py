"""Data-parallel ranks on the host: where a sequence goes, what ranks do not share, and the step that they take."""

from dataclasses import replace

import numpy as np
import pytest

from seer_jax.config.schema import EngineConfig, SpeculationConfig
from seer_jax.core import packing
from seer_jax.core.batching import BatchPlanner
from seer_jax.core.packing import Run, packed_size, views
from seer_jax.core.rank_packing import pack_ranks, pick_shape, pick_verify_shape, unpack_ranks
from seer_jax.core.sequence import Sequence
from seer_jax.core.step_shapes import StepBuckets
from seer_jax.core.types import RequestChunk
from tests.core.planners import check_pages, make_chunk, make_planner, run


def admit(planner: BatchPlanner, *chunks: RequestChunk) -> list[int]:
    """Ranks of those that are admitted."""
    for chunk in chunks:
        planner.add(chunk)
    return [sequence.rank for sequence in planner.admit()]


def test_a_sequence_goes_to_the_rank_with_the_most_free_pages_that_has_a_slot() -> None:
    planner = make_planner(num_pages=16, max_num_seqs=2, num_ranks=2)
    sizes = [40, 3, 3, 3, 3]  # The first takes 13 of 16 pages; the fourth finds rank 1 emptier, and full.
    chunks = [make_chunk(i, prompt=size, group=i, reserve=True) for i, size in enumerate(sizes)]
    assert admit(planner, *chunks) == [0, 1, 1]
    assert len(planner.waiting) == 2  # 4 pages are free on no rank with a slot.
    check_pages(planner)


def test_siblings_share_their_prompt_on_the_rank_where_they_meet() -> None:
    planner = make_planner(num_pages=16, num_ranks=2)
    chunks = [make_chunk(i, prompt=21, max_new=4, reserve=True, share=True) for i in range(4)]
    # 7 pages alone, 2 beside a sibling, whose 5 count as free.
    assert admit(planner, *chunks) == [0, 1, 0, 1]
    assert [rank.pool.num_free_pages for rank in planner.ranks] == [16 - 7 - 2] * 2
    check_pages(planner)
    planner.plan()
    assert {sequence.num_computed for sequence in planner.running} == {0}  # Nobody takes from the other rank.


def test_a_request_returns_to_its_rank_or_else_gives_its_pages_up_there() -> None:
    planner = make_planner(num_pages=16, max_num_seqs=1, num_ranks=2)
    first = make_chunk(0, prompt=5, max_new=4, reserve=True)
    assert admit(planner, first) == [0]
    while planner.running:
        for sequence in run(planner, planner.plan()):
            known = sequence.token_ids[: sequence.num_tokens].copy()
            planner.park(sequence)
    again = replace(first, chunk_index=1, token_ids=known, num_reserved_pages=5)
    assert admit(planner, again) == [0] and planner.running[0].num_computed == len(known) - 1
    run(planner, planner.plan())
    for sequence in list(planner.running):
        planner.running[0].limit = sequence.num_tokens
        planner.park(sequence)
    assert admit(planner, make_chunk(1, group=1, reserve=True)) == [0]  # Parked pages count as free.
    assert admit(planner, again) == [1] and not planner.parked and planner.running[1].num_computed == 0
    assert [request_id for request_id, _ in planner.evicted] == [first.request_id]
    check_pages(planner)


def test_the_youngest_of_the_rank_that_runs_out_of_pages_is_preempted() -> None:
    planner = make_planner(num_pages=4, max_num_seqs=2, num_ranks=2, max_steps_per_dispatch=1)
    chunks = [make_chunk(i, prompt=size, max_new=9, group=i, reserve=False) for i, size in enumerate((6, 3, 4))]
    assert admit(planner, *chunks) == [0, 1, 1]
    while not planner.waiting:
        run(planner, planner.plan())
    (waiting,) = planner.waiting
    assert waiting.chunk is chunks[2] and planner.num_preemptions == 1
    assert [sequence.rank for sequence in planner.running] == [0, 1]
    check_pages(planner)


CONFIG = EngineConfig(
    max_num_seqs=8, num_pages=40, page_size=4, max_model_len=32, max_prefill_tokens=32, prefill_tile=8
)


def make_run(index: int, rank: int, count: int = 1) -> Run:
    """`count` tokens at the end of a context of 12, on pages from the rank's fourth on."""
    sequence = Sequence(make_chunk(index, prompt=12, reserve=True), index, rank=rank)
    sequence.pages = [20 * rank + 3, 20 * rank + 4, 20 * rank + 5]
    return Run(sequence=sequence, start=12 - count, token_ids=sequence.token_ids[12 - count : 12], samples=True)


def test_a_step_has_the_shape_of_the_fullest_rank_and_tables_that_count_from_each_ranks_first_page() -> None:
    buckets = StepBuckets(CONFIG, SpeculationConfig(), num_ranks=2)
    rows, slices = [make_run(0, 1), make_run(1, 0), make_run(2, 1), make_run(3, 1)], [make_run(4, 0, 9)]
    assert pick_shape(buckets, rows, []).num_rows == 4
    shape = pick_shape(buckets, rows, slices)
    assert (shape.num_rows, shape.num_tiles) == (4, 2)
    packed = pack_ranks(rows, slices, shape, 1, buckets)
    assert packed.shape == (2 * packed_size(shape),)
    for part, num_runs, num_tokens in zip(packed.reshape(2, -1), (2, 3), (1 + 9, 3), strict=True):
        requests, tokens, _ = views(part, shape)
        assert requests[:num_runs, packing.NUM_FIELDS :][:, :3].tolist() == num_runs * [[3, 4, 5]]
        assert not requests[num_runs:, packing.NUM_FIELDS :].any()
        assert (tokens[:, packing.LIMIT] > 0).sum() == num_tokens
    outputs = np.zeros((2, 1 + shape.num_requests * 3), np.int32)
    outputs[:, 0] = 1
    for rank, num_runs in enumerate((2, 3)):
        table = outputs[rank, 1:].reshape(shape.num_requests, 3)
        table[:num_runs, 0], table[:num_runs, 1] = 1, 10 * rank + np.arange(num_runs)
    steps, emitted = unpack_ranks(outputs.reshape(-1), rows, slices, shape, buckets)
    assert steps == 1 and len(emitted) == 5
    assert [emitted[run.sequence].token_ids.tolist() for run in (*rows, *slices)] == [[10], [0], [11], [12], [1]]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("verify_tile", [1, 3])
def test_all_drafts_of_a_step_may_be_of_one_rank(deterministic: bool, verify_tile: int) -> None:
    speculation = SpeculationConfig(mode="grouped", max_draft_tokens=5)
    buckets = StepBuckets(replace(CONFIG, deterministic=deterministic), speculation, verify_tile, num_ranks=2)
    runs = [make_run(i, 1, 6) for i in range(4)]
    shape = pick_verify_shape(buckets, runs)
    assert buckets.max_verify_tokens >= shape.num_tokens >= 4 * 6
    rows, tiles = ([], runs) if shape.num_tiles else (runs, [])
    _, tokens, _ = views(pack_ranks(rows, tiles, shape, 1, buckets).reshape(2, -1)[1], shape)
    assert (tokens[:, packing.LIMIT] > 0).sum() == 4 * 6
