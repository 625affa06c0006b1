"""The batch planner: pages, preemption, order, progress."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.batching import BatchPlanner, StepPlan
from seer_jax.core.errors import ProtocolError
from seer_jax.core.placement import InstanceLoad
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId, SamplingParams

PAGE_SIZE = 4
STOP = 7


def make_planner(num_pages: int = 32, max_num_seqs: int = 4, **kwargs: int) -> BatchPlanner:
    info = InstanceInfo(
        instance_id=0, num_total_pages=num_pages, page_size=PAGE_SIZE, max_num_seqs=max_num_seqs, max_model_len=128
    )
    settings = {"max_prefill_tokens": 16, "prefill_tile": 4, "max_steps_per_dispatch": 8} | kwargs
    return BatchPlanner(info, **settings)


def make_chunk(
    index: int,
    prompt: int = 5,
    max_new: int = 10,
    *,
    reserve: bool,
    priority: int = 0,
    limit: int = 10_000,
    group: int = 0,
    share: bool = False,
) -> RequestChunk:
    return RequestChunk(
        request_id=RequestId(group, index),
        chunk_index=0,
        token_ids=np.arange(prompt, dtype=np.int32) + 100 * (1 + group),
        num_prompt_tokens=prompt,
        max_chunk_tokens=max_new,
        max_total_tokens=prompt + limit,
        num_reserved_pages=-(-(prompt + max_new) // PAGE_SIZE) if reserve else 0,
        num_shared_pages=(prompt - 1) // PAGE_SIZE if share else 0,
        policy_version=0,
        priority=priority,
        sampling=SamplingParams(max_tokens=limit, stop_token_ids=(STOP,)),
        sampling_key=index,
    )


def say(sequence: Sequence, start: int, stop: int) -> np.ndarray:
    """Tokens that differ by request and position."""
    group, index = sequence.chunk.request_id
    return (1000 * (1 + 10 * group + index) + np.arange(start, stop)).astype(np.int32)


def run(planner: BatchPlanner, plan: StepPlan, token: int | None = 1) -> list[Sequence]:
    """Pretend to compute a plan: sequences emit `token`, or what they `say`, until the dispatch or one of them ends."""
    sampling = [*plan.decodes, *(piece.sequence for piece in plan.prefills if piece.is_last)]
    steps = 1 if plan.prefills else plan.num_steps
    steps = min([steps, *(s.limit - s.num_tokens for s in sampling)])
    emitted = {}
    for sequence in sampling:
        start, same = sequence.num_tokens, np.full(steps, token or 0, np.int32)
        said = say(sequence, start, start + steps) if token is None else same
        emitted[sequence] = NewTokens(said, np.full(steps, -0.5, np.float32))
    return planner.commit(plan, emitted)


class FakeCache:
    """What the pages hold, as the device would see it: the token whose KV lies in every slot."""

    def __init__(self, planner: BatchPlanner, token: int | None = 1) -> None:
        self._planner, self._token = planner, token
        self._slots = np.full((planner.pool.num_pages, PAGE_SIZE), -1)
        self.texts: dict[RequestId, np.ndarray] = {}

    def save_evicted(self) -> None:
        """What was parked must still be there when its pages are given away."""
        for request_id, parked in self._planner.evicted:
            content = self._slots[parked.pages].reshape(-1)[: len(parked.token_ids)]
            assert content.tolist() == self.texts[request_id][: len(parked.token_ids)].tolist()
        self._planner.evicted.clear()

    def run(self, plan: StepPlan) -> list[Sequence]:
        """Like `run`; every query must find its whole context in its pages."""
        self._slots[[target for _, target in plan.copies]] = self._slots[[source for source, _ in plan.copies]]
        written = {s: (s.num_tokens - 1, s.num_tokens) for s in plan.decodes}
        written |= {piece.sequence: (piece.start, piece.start + piece.count) for piece in plan.prefills}
        for sequence, (start, stop) in written.items():
            self._write(sequence, start, stop)
            assert [self._slots[self._at(sequence, i)] for i in range(stop)] == sequence.token_ids[:stop].tolist()
        finished = run(self._planner, plan, self._token)
        for sequence, (_, stop) in written.items():
            self._write(sequence, stop, sequence.num_computed)  # What the later steps of the dispatch computed.
        return finished

    def read(self, pages: list[int], num_tokens: int) -> np.ndarray:
        """What lies in pages, as it would be copied to the host."""
        return self._slots[pages].reshape(-1)[:num_tokens].copy()

    def load(self, pages: list[int], content: np.ndarray) -> None:
        """Write such a copy into whole pages; what is beyond its end is garbage."""
        padded = np.full(len(pages) * PAGE_SIZE, -1)
        padded[: len(content)] = content
        self._slots[pages] = padded.reshape(-1, PAGE_SIZE)

    def _write(self, sequence: Sequence, start: int, stop: int) -> None:
        for position in range(start, stop):
            self._slots[self._at(sequence, position)] = sequence.token_ids[position]

    def _at(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE


def check_pages(planner: BatchPlanner) -> None:
    """Every page is free, parked, a shared prompt's or owned by exactly one running sequence."""
    holders = [*planner.running, *planner.parked.values()]
    prompts = {id(owner.prompt): owner.prompt.pages for owner in holders if owner.prompt}
    owned = [page for pages in prompts.values() for page in pages]
    for owner in holders:
        num_shared = len(owner.prompt.pages) if owner.prompt else 0
        assert owner.pages[:num_shared] == (owner.prompt.pages if owner.prompt else [])
        owned += owner.pages[num_shared:]
    assert len(set(owned)) == len(owned)
    assert len(owned) + planner.pool.num_free_pages == planner.pool.num_total_pages
    assert all(not sequence.pages for sequence in planner.waiting)


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
)
def test_every_chunk_finishes_with_its_context_in_its_pages_and_no_page_is_lost(
    groups: list[tuple[int, bool, list[tuple[int, bool]]]],
    num_pages: int,
    max_num_seqs: int,
    chunk_size: int,
    all_reserve: bool,
) -> None:
    """Reserving requests run in chunks and go on from what they parked, or from what siblings have of the prompt.

    Where all reserve, the driver's books say which of them run.
    """
    planner = make_planner(num_pages, max_num_seqs)
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
        if all_reserve:
            assert [sequence.chunk.request_id for sequence in planner.waiting] == load.queued
            used = planner.pool.num_total_pages - planner.status().num_free_pages
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
        assert sum(-(-piece.count // 4) * 4 for piece in plan.prefills) <= 16 + 3
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
    assert planner.pool.num_free_pages == num_pages and not planner.running and not planner.waiting


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
    assert planner.pool.num_free_pages == 16


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
