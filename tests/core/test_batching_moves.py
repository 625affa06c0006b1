"""Planners of several instances between which requests move: KV that is handed over, kept in a pool, or lost."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_jax.core.placement import InstanceLoad
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestChunk, RequestId
from tests.core.planners import PAGE_SIZE, FakeCache, check_pages, make_chunk, make_planner, num_free_pages, say

BLOCK_PAGES = 2


class Instance:
    """A planner with what the engine adds: pages with content, KV that comes and goes, and the driver's books of it.

    Of a request it keeps, in place of KV, the tokens whose KV that would be, from position 0 on.
    """

    def __init__(self, num_pages: int, num_slots: int, rng: random.Random, loss: float) -> None:
        self.planner = make_planner(num_pages, num_slots)
        self.load = InstanceLoad(info=self.planner.info)
        self.cache = FakeCache(self.planner, token=None)
        self.counts: Counter[str] = Counter()
        self._rng, self._loss = rng, loss
        self._pool: dict[RequestId, np.ndarray] = {}

    def give(self, request_id: RequestId) -> np.ndarray | None:
        """Like `PausedKV.begin_take`."""
        parked = self.planner.unpark(request_id)
        if parked is None:
            return self._pool.pop(request_id, None)
        return self.cache.read(parked.pages, len(parked.token_ids))

    def submit(self, chunk: RequestChunk, moved: np.ndarray | None) -> None:
        """Queue a chunk; what siblings are said to have must be here."""
        num_present = self.planner.num_present(chunk)
        if num_present:
            self.counts["present"] += 1
            pages = self.planner.ranks[0].find_prompt(chunk).pages
            assert self.cache.read(pages, num_present).tolist() == chunk.token_ids[:num_present].tolist()
        if moved is not None:
            self._pool[chunk.request_id] = moved
        self.load.add(chunk)
        self.planner.add(chunk)

    def step(self) -> list[Sequence]:
        """Like `Engine.step`; returns what finished, still with its pages."""
        admitted = self.planner.admit()
        self._save_evicted()
        for sequence in admitted:
            self._bring(sequence)
        assert [sequence.chunk.request_id for sequence in self.planner.waiting] == self.load.queued
        used = self.planner.info.num_total_pages - self.planner.status().num_free_pages
        assert used == self.load.num_reserved_pages
        plan = self.planner.plan()
        self._save_evicted()
        check_pages(self.planner)
        return [] if plan is None else self.cache.run(plan)

    def _save_evicted(self) -> None:
        evicted = list(self.planner.evicted)
        self.cache.save_evicted()
        for request_id, parked in evicted:
            self.counts["evicted"] += 1
            self._pool[request_id] = self.cache.read(parked.pages, len(parked.token_ids))

    def _bring(self, sequence: Sequence) -> None:
        """Like `PausedKV.bring`; of what the pool had the last blocks may be lost."""
        kept, num_present = self._pool.pop(sequence.chunk.request_id, None), sequence.num_computed
        if kept is None or num_present >= len(kept):
            return
        if self._rng.random() < self._loss:
            block_tokens = BLOCK_PAGES * PAGE_SIZE
            kept = kept[: self._rng.randint(0, len(kept) // block_tokens) * block_tokens]
        if num_present >= len(kept):
            self.counts["lost"] += 1
            return
        first, end = num_present // PAGE_SIZE, self.planner.pages_for(len(kept))
        self.cache.load(sequence.pages[first:end], kept[first * PAGE_SIZE :])
        sequence.note_kv(len(kept))
        self.counts["imported beside siblings" if num_present else "imported"] += 1


def play(
    seed: int,
    groups: list[tuple[int, bool, list[int]]],
    num_pages: list[int],
    num_slots: int,
    chunk_size: int,
    loss: float = 0.3,
) -> Counter[str]:
    """Run groups of (prompt tokens, shares its pages, response lengths) to their end; what happened how often.

    A share `loss` of what moves is lost; else nothing is computed twice.
    """
    rng = random.Random(seed)
    instances = [Instance(pages, num_slots, rng, loss) for pages in num_pages]
    true_lengths, lengths = {}, {}
    for group, (prompt, share, responses) in enumerate(groups):
        for index, length in enumerate(responses):
            chunk = make_chunk(
                index, prompt, min(chunk_size, length), reserve=True, limit=length, group=group, share=share
            )
            rng.choice(instances).submit(chunk, None)
            true_lengths[chunk.request_id] = length
    moved_total = 0
    while len(lengths) < len(true_lengths):
        instance = rng.choice(
            [instance for instance in instances if instance.planner.running or instance.planner.waiting]
        )
        for sequence in instance.step():
            chunk, known = sequence.chunk, sequence.token_ids[: sequence.num_tokens].copy()
            instance.load.remove(chunk.request_id)
            if sequence.finish_reason == "length":
                instance.planner.release(sequence)
                assert (
                    known[chunk.num_prompt_tokens :].tolist()
                    == say(sequence, chunk.num_prompt_tokens, len(known)).tolist()
                )
                lengths[chunk.request_id] = len(known) - chunk.num_prompt_tokens
                continue
            instance.cache.texts[chunk.request_id] = known
            instance.planner.park(sequence)
            size = min(chunk_size, chunk.max_total_tokens - len(known))
            following = replace(
                chunk,
                chunk_index=chunk.chunk_index + 1,
                token_ids=known,
                max_chunk_tokens=size,
                num_reserved_pages=-(-(len(known) + size) // PAGE_SIZE),
            )
            target = rng.choice(instances)
            moved = None
            if target is not instance:
                moved, moved_total = instance.give(chunk.request_id), moved_total + 1
                if rng.random() < loss:
                    moved = None  # The message, or the instance, died on the way.
            target.submit(following, moved)
    assert lengths == true_lengths
    for instance, pages in zip(instances, num_pages, strict=True):
        planner = instance.planner
        assert num_free_pages(planner) == pages and not planner.running and not planner.waiting
        assert not instance._pool
        assert loss or not planner.num_reprefilled_tokens
    return sum((instance.counts for instance in instances), Counter(moved=moved_total))


@settings(max_examples=60)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.integers(1, 26), st.booleans(), st.lists(st.integers(1, 26), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.integers(13, 32), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 10),
    st.sampled_from([0.0, 0.3]),
)
def test_kv_that_moves_is_whole_wherever_its_request_goes_on(seed, groups, num_pages, num_slots, chunk_size, loss):
    play(seed, groups, num_pages, num_slots, chunk_size, loss)


def test_everything_that_can_happen_to_kv_happens_in_these_games():
    """Else the test above would say little."""
    groups = [(13 + 4 * group, True, [10, 22, 5, 26]) for group in range(4)]
    counts = sum((play(seed, groups, [16, 20], 3, 5) for seed in range(20)), Counter())
    assert {"moved", "present", "evicted", "lost", "imported", "imported beside siblings"} <= counts.keys()
