"""A batch planner, chunks for it, and a cache that sees whether its pages hold what they should."""

import numpy as np

from seer_jax.core.batching import BatchPlanner
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.step_plan import StepPlan
from seer_jax.core.types import InstanceInfo, RequestChunk, RequestId, SamplingParams

PAGE_SIZE = 4
STOP = 7


def make_planner(num_pages: int = 32, max_num_seqs: int = 4, num_ranks: int = 1, **kwargs: int) -> BatchPlanner:
    """`num_pages` and `max_num_seqs` are a rank's."""
    info = InstanceInfo(
        instance_id=0,
        num_total_pages=num_ranks * num_pages,
        page_size=PAGE_SIZE,
        max_num_seqs=num_ranks * max_num_seqs,
        max_model_len=128,
    )
    settings = {"max_prefill_tokens": 16, "prefill_tile": 4, "max_steps_per_dispatch": 8} | kwargs
    settings["num_ranks"] = num_ranks
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
        self._slots = np.full((sum(rank.pool.num_pages for rank in planner.ranks), PAGE_SIZE), -1)
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


def num_free_pages(planner: BatchPlanner) -> int:
    return sum(rank.pool.num_free_pages for rank in planner.ranks)


def check_pages(planner: BatchPlanner) -> None:
    """Every page of a rank is free, parked there, a shared prompt's or owned by one sequence that runs there."""
    for index, rank in enumerate(planner.ranks):
        running = [sequence for sequence in planner.running if sequence.rank == index]
        assert len(running) == rank.num_running <= planner.info.max_num_seqs // len(planner.ranks)
        holders = [*running, *rank.parked.values()]
        prompts = {id(owner.prompt): owner.prompt.pages for owner in holders if owner.prompt}
        owned = [page for pages in prompts.values() for page in pages]
        for owner in holders:
            num_shared = len(owner.prompt.pages) if owner.prompt else 0
            assert owner.pages[:num_shared] == (owner.prompt.pages if owner.prompt else [])
            owned += owner.pages[num_shared:]
        size = rank.pool.num_pages
        assert all(index * size < page < (index + 1) * size for page in owned)
        assert len(set(owned)) == len(owned)
        assert len(owned) + rank.pool.num_free_pages == rank.pool.num_total_pages
    assert all(not sequence.pages for sequence in planner.waiting)
