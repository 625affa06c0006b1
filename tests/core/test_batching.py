"""The batch planner: pages, preemption, order, progress."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.errors import ProtocolError
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.types import RequestChunk, RequestId
from tests.core.planners import PAGE_SIZE, STOP, FakeCache, check_pages, make_chunk, make_planner, num_free_pages, run


@given(
    st.lists(
        st.tuples(
            st.integers(1, 20),
            st.booleans(),
            st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(13, 40),
    st.integers(1, 5),
    st.integers(1, 12),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_chunk_finishes_with_its_context_in_its_pages_and_no_page_is_lost(
    groups: list[tuple[int, bool, list[tuple[int, bool]]]],
    num_pages: int,
    max_num_seqs: int,
    chunk_size: int,
    all_reserve: bool,
    num_ranks: int,
) -> None:
    """Reserving requests run in chunks and go on from what they parked, or from what siblings have of the prompt.

    Where all reserve and there is one rank, the driver's books say which of them run.
    """
    planner = make_planner(num_pages, max_num_seqs, num_ranks)
    cache = FakeCache(planner)
    load = InstanceLoad(info=planner.info)
    true_lengths = {}

    def send(chunk: RequestChunk) -> None:
        load.add(chunk)
        planner.add(chunk)

    for group, (prompt, share, requests) in enumerate(groups):
        for index, (max_new, reserve) in enumerate(requests):
            reserve |= all_reserve
            size = min(chunk_size, max_new) if reserve else max_new
            send(make_chunk(index, prompt, size, reserve=reserve, limit=max_new, group=group, share=share))
            true_lengths[RequestId(group, index)] = max_new
    lengths = {}
    for _ in range(5000):
        planner.admit()
        cache.save_evicted()
        if all_reserve and num_ranks == 1:
            assert [sequence.chunk.request_id for sequence in planner.waiting] == load.queued
            used = planner.info.num_total_pages - planner.status().num_free_pages
            assert used == load.num_reserved_pages
        plan = planner.plan()
        cache.save_evicted()
        if plan is None:
            break
        check_pages(planner)
        steps = 1 if plan.prefills else plan.num_steps
        for sequence in plan.decodes:
            last_written = min(sequence.num_tokens + steps - 1, sequence.limit) - 1
            assert last_written < len(sequence.pages) * PAGE_SIZE
        for piece in plan.prefills:
            assert piece.start + piece.count <= len(piece.sequence.pages) * PAGE_SIZE
        for rank in range(num_ranks):
            assert sum(-(-p.count // 4) * 4 for p in plan.prefills if p.sequence.rank == rank) <= 16 + 3
        for sequence in cache.run(plan):
            chunk, known = sequence.chunk, sequence.token_ids[: sequence.num_tokens].copy()
            load.remove(chunk.request_id)
            if sequence.finish_reason == "length":
                planner.release(sequence)
                lengths[chunk.request_id] = len(known) - chunk.num_prompt_tokens
                continue
            planner.park(sequence)
            cache.texts[chunk.request_id] = known
            size = min(chunk_size, chunk.max_total_tokens - len(known))
            num_pages_needed = -(-(len(known) + size) // PAGE_SIZE)
            send(
                replace(
                    chunk,
                    chunk_index=chunk.chunk_index + 1,
                    token_ids=known,
                    max_chunk_tokens=size,
                    num_reserved_pages=num_pages_needed,
                )
            )
    assert lengths == true_lengths
    assert [rank.pool.num_free_pages for rank in planner.ranks] == num_ranks * [num_pages]
    assert not planner.running and not planner.waiting


def test_siblings_have_the_full_pages_of_their_prompt_in_common() -> None:
    planner = make_planner(num_pages=6 + 2 * 4)  # Own pages for each would be 30.
    cache = FakeCache(planner)
    for index in range(3):
        planner.add(make_chunk(index, prompt=17, max_new=5, reserve=True, share=True))
    leader, *followers = planner.admit()
    assert [len(sequence.pages) for sequence in (leader, *followers)] == [6, 6, 6]
    assert {tuple(sequence.pages[:4]) for sequence in (leader, *followers)} == {(1, 2, 3, 4)}
    assert planner.status().num_free_pages == 14 - 6 - 2 * 2
    plan = planner.plan()  # The others wait for the leader.
    assert [(piece.sequence, piece.count) for piece in plan.prefills] == [(leader, 16)] and not plan.decodes
    cache.run(plan)
    plan = planner.plan()
    assert plan.decodes == [leader, *followers] and not plan.copies
    cache.run(plan)
    assert planner.num_prefilled_tokens == 16 and planner.num_shared_tokens == 2 * 16


def test_a_prompt_outlives_its_first_request_and_goes_with_the_last() -> None:
    planner = make_planner(num_pages=16)
    cache = FakeCache(planner)
    planner.add(make_chunk(0, prompt=9, max_new=3, reserve=True, share=True))
    planner.admit()
    cache.run(planner.plan())
    (first,) = cache.run(planner.plan())
    pages = first.pages[:2]
    cache.texts[first.chunk.request_id] = first.token_ids[: first.num_tokens].copy()
    planner.park(first)
    planner.add(make_chunk(1, prompt=9, max_new=3, reserve=True, share=True))
    (second,) = planner.admit()
    assert second.pages[:2] == pages and second.num_computed == 8
    # Whoever needs all the rest evicts the paused sibling, but not what it shares.
    planner.add(make_chunk(2, prompt=5, max_new=47, reserve=True, group=1))
    planner.admit()
    assert len(planner.running) == 2 and not planner.parked and planner.status().num_free_pages == 0
    cache.save_evicted()
    check_pages(planner)
    while planner.running:
        for sequence in cache.run(planner.plan()):
            planner.release(sequence)
    assert num_free_pages(planner) == 16


def test_prompt_of_a_group_is_computed_once_and_copied_when_complete() -> None:
    planner = make_planner()
    cache = FakeCache(planner)
    for index in range(3):
        planner.add(make_chunk(index, prompt=21, reserve=True))
    leader, *followers = planner.admit()
    for count in (16, 5):  # The others wait for the leader, whose prompt takes two steps.
        plan = planner.plan()
        assert [(piece.sequence, piece.count) for piece in plan.prefills] == [(leader, count)]
        assert not plan.decodes and not plan.copies
        cache.run(plan)
    plan = planner.plan()
    assert plan.decodes == [leader, *followers] and not plan.prefills
    # 20 tokens are copied, 5 pages each; the 21st is computed, because the next token is drawn from it.
    assert plan.copies == [pair for s in followers for pair in zip(leader.pages[:5], s.pages[:5], strict=True)]
    assert planner.num_prefilled_tokens == 21 and planner.num_shared_tokens == 2 * 20
    cache.run(plan)


def test_prompts_are_compared_by_their_tokens() -> None:
    planner = make_planner()
    chunk = make_chunk(0, prompt=8, reserve=True)
    planner.add(chunk)
    planner.add(replace(make_chunk(1, prompt=8, reserve=True), token_ids=chunk.token_ids[::-1].copy()))
    planner.admit()
    run(planner, planner.plan())
    assert planner.num_prefilled_tokens == 16 and planner.num_shared_tokens == 0


def test_reserved_chunks_are_never_preempted_and_hold_their_pages_from_admission() -> None:
    planner = make_planner(num_pages=8)
    for index in range(3):
        planner.add(make_chunk(index, 5, 10, reserve=True))  # 4 pages each: two fit
    assert len(planner.admit()) == 2
    while planner.running:
        assert all(len(sequence.pages) == 4 for sequence in planner.running)
        for sequence in run(planner, planner.plan()):
            planner.release(sequence)
        planner.admit()
    assert planner.num_preemptions == 0


def test_youngest_growing_sequence_is_preempted_and_recomputed_with_its_tokens() -> None:
    planner = make_planner(num_pages=8)
    for index in range(3):
        planner.add(make_chunk(index, 5, 20, reserve=False))
    planner.admit()
    preempted_at = None
    finished = {}
    while planner.running or planner.waiting:
        before = planner.num_preemptions
        youngest = max(planner.running, key=lambda s: s.arrival, default=None)
        plan = planner.plan()
        if planner.num_preemptions > before and preempted_at is None:
            preempted_at = youngest
            assert youngest in planner.waiting and youngest.num_computed == 0 and youngest.num_new > 0
        for sequence in run(planner, plan):
            finished[sequence.chunk.request_id.index] = sequence.token_ids[: sequence.num_tokens]
            planner.release(sequence)
        planner.admit()
    assert preempted_at is not None
    assert planner.num_reprefilled_tokens > 0
    assert sorted(finished) == [0, 1, 2]
    assert all(list(tokens) == [*range(100, 105), *[1] * 20] for tokens in finished.values())


def test_priority_goes_before_arrival_among_waiting_chunks() -> None:
    planner = make_planner(max_num_seqs=1)
    planner.add(make_chunk(0, reserve=True, priority=1))
    planner.add(make_chunk(1, reserve=True, priority=0))
    assert [sequence.chunk.request_id.index for sequence in planner.admit()] == [1]


def test_long_prompt_is_prefilled_in_slices_beside_running_decodes() -> None:
    planner = make_planner()
    planner.add(make_chunk(0, prompt=3, reserve=True))
    planner.admit()
    run(planner, planner.plan())
    planner.add(make_chunk(1, prompt=40, reserve=True))
    planner.admit()
    counts = []
    while (plan := planner.plan()).prefills:
        assert [sequence.chunk.request_id.index for sequence in plan.decodes] == [0]
        assert plan.num_steps == 1 or plan.prefills[0].is_last
        counts.append(plan.prefills[0].count)
        run(planner, plan)
    assert counts == [16, 16, 8]


@pytest.mark.parametrize(("token", "limit", "reason"), [(STOP, 100, "stop"), (1, 10, "length"), (1, 100, "chunk")])
def test_finish_reason_tells_stop_token_from_limit_from_chunk_end(token: int, limit: int, reason: str) -> None:
    planner = make_planner(max_steps_per_dispatch=1)
    planner.add(make_chunk(0, max_new=10, reserve=True, limit=limit))
    planner.admit()
    finished = []
    while not finished:
        finished = run(planner, planner.plan(), token)
    assert finished[0].finish_reason == reason


def test_release_of_a_running_sequence_is_a_bug() -> None:
    planner = make_planner()
    planner.add(make_chunk(0, reserve=True))
    (sequence,) = planner.admit()
    with pytest.raises(ProtocolError):
        planner.release(sequence)
