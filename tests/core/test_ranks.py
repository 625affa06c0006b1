"""The batch planner with data-parallel ranks: where a sequence goes, and what ranks do not share."""

from dataclasses import replace

from seer_jax.core.batching import BatchPlanner
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
