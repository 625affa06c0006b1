"""Continuous batching of one instance: which sequences run in the next step, on which pages.

Pure host logic: the engine and the simulator drive the same `BatchPlanner`. It serves chunks with reserved pages (Seer:
never preempted) and chunks that grow on demand (the baseline: the youngest is preempted when pages run out).
"""

import bisect
from collections import ChainMap
from collections.abc import Container, Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np

from seer_jax.core.errors import ProtocolError
from seer_jax.core.kv.page_pool import PagePool, pages_for_tokens
from seer_jax.core.kv.rank_pages import ParkedKV, RankPages
from seer_jax.core.kv.shared_prompts import SharedPrompt
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.step_plan import PrefillSlice, StepPlan
from seer_jax.core.types import InstanceInfo, InstanceStatus, RequestChunk, RequestId


class BatchPlanner:
    """Admits chunks, hands out pages, plans steps, books results.

    A cycle is `admit` (then import KV of the admitted), `plan`, run, `commit`, `release` or `park` of what finished.
    Requests of a group have the full pages of their prompt in common and write into none of them but to compute them;
    the rest of the prompt is copied from a sibling that runs at the same time instead of computing it again.

    With data-parallel attention an instance has several ranks, each with its share of the slots, of the pages and of a
    step's prefill; a request keeps to the one that admitted it. `core.kv.rank_pages` keeps the books of a rank's pages.

    Attributes:
        ranks: Rank r has the pages from r times a rank's pages on, the first of which is never handed out.
        parked: KV of paused requests on all ranks. On each the one parked longest is evicted first, except that the
            first in the queue keeps its own to the last.
        evicted: Parked KV whose pages were given away since the caller last emptied this list. Their content is intact
            until the next import, copy or step.

    Invariants: those of `RankPages`; a sequence with reserved pages is never preempted; a running sequence has a page
    for every position that the planned steps write.
    """

    def __init__(
        self,
        info: InstanceInfo,
        *,
        max_prefill_tokens: int,
        prefill_tile: int,
        max_steps_per_dispatch: int,
        num_ranks: int = 1,
    ) -> None:
        """Start empty.

        Args:
            info: Capacity of the instance, all ranks together.
            max_prefill_tokens: Prefill tokens of a rank per step at most, every slice rounded up to whole tiles.
            prefill_tile: Tokens per prefill tile.
            max_steps_per_dispatch: Decode steps per dispatch at most.
            num_ranks: Data-parallel ranks; divides slots and pages.
        """
        self.info = info
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.evicted: list[tuple[RequestId, ParkedKV]] = []
        rank_pages = info.num_total_pages // num_ranks + 1  # + the garbage page
        pools = (PagePool(rank_pages, info.page_size, rank * rank_pages) for rank in range(num_ranks))
        self.ranks = [RankPages(pool, self.evicted) for pool in pools]
        self.parked: Mapping[RequestId, ParkedKV] = ChainMap(*(rank.parked for rank in self.ranks))
        self._rank_slots = info.max_num_seqs // num_ranks
        self.max_prefill_tokens, self.prefill_tile = max_prefill_tokens, prefill_tile
        self.max_steps_per_dispatch = max_steps_per_dispatch
        self._arrivals = 0
        self.start_iteration()

    def add(self, chunk: RequestChunk) -> None:
        """Queue a chunk."""
        self._arrivals += 1
        bisect.insort(self.waiting, Sequence(chunk, self._arrivals), key=lambda s: s.order)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into free slots while their pages last, in order; the first that does not fit blocks.

        A sequence goes where its KV is parked, or else, and where that rank has no room, to the one with most room.

        Returns:
            The admitted; their `num_computed` is what was parked here, and may be raised by whoever imports their KV.
        """
        admitted = []
        while self.waiting and (rank := self._find_rank(self.waiting[0])) is not None:
            sequence = self.waiting.pop(0)
            sequence.rank = rank
            parked = self.ranks[rank].start(sequence, *self._num_pages(sequence, self.ranks[rank]))
            self._note_present(sequence, parked)
            self.running.append(sequence)
            admitted.append(sequence)
        self._note_usage()
        return admitted

    def num_present(self, chunk: RequestChunk) -> int:
        """Leading tokens of a chunk that waits whose KV siblings have on every rank; it may be gone at admission."""
        return min(self._num_computed(rank.find_prompt(chunk)) for rank in self.ranks)

    def plan(self) -> StepPlan | None:
        """Plan the next dispatch; None when nothing runs. May preempt growing sequences, youngest first."""
        num_steps = self._grow_pages()
        decodes, prefills, is_prefilling = [], [], False
        budgets = [self.max_prefill_tokens for _ in self.ranks]
        copied: dict[Sequence, list[tuple[int, int]]] = {}
        for sequence in self.running:
            leader = self._find_prompt_leader(sequence, copied)
            if leader is not sequence:
                if leader.num_computed < sequence.num_sharable:
                    is_prefilling = True
                    continue
                copied[sequence] = self._copy_prompt(leader, sequence)
            if sequence.num_pending == 1:
                decodes.append(sequence)
                continue
            count = min(sequence.num_pending, budgets[sequence.rank])
            is_prefilling |= count < sequence.num_pending
            if count:
                prefills.append(PrefillSlice(sequence=sequence, start=sequence.num_computed, count=count))
                budgets[sequence.rank] -= -(-count // self.prefill_tile) * self.prefill_tile
        if not decodes and not prefills:
            return None
        copies = [copy for pages in copied.values() for copy in pages]
        return StepPlan(decodes=decodes, prefills=prefills, num_steps=1 if is_prefilling else num_steps, copies=copies)

    def commit(self, plan: StepPlan, emitted: dict[Sequence, NewTokens]) -> list[Sequence]:
        """Book what a dispatch computed.

        Args:
            plan: What was run.
            emitted: What every sequence that sampled says.

        Returns:
            Sequences that finished; they keep their pages until `release`.
        """
        for piece in plan.prefills:
            piece.sequence.num_computed = piece.start + piece.count
            again = min(piece.count, piece.sequence.num_lost)
            piece.sequence.num_lost -= again
            self.num_reprefilled_tokens += again
            self.num_prefilled_tokens += piece.count
        finished = []
        for sequence, new in emitted.items():
            sequence.extend(new)
            self.num_generated_tokens += len(new.token_ids)
            if sequence.finish_reason is not None:
                finished.append(sequence)
        return finished

    def release(self, sequence: Sequence) -> None:
        """Free the pages of a finished sequence."""
        self._retire(sequence)
        self.ranks[sequence.rank].free(sequence)

    def park(self, sequence: Sequence) -> None:
        """Release a sequence whose request goes on later; its KV stays while nobody needs the pages."""
        self._retire(sequence)
        self.ranks[sequence.rank].park(sequence)

    def unpark(self, request_id: RequestId) -> ParkedKV | None:
        """Give up a request's parked KV; the pages are free, their content is intact until something is written."""
        return next((parked for rank in self.ranks if (parked := rank.unpark(request_id))), None)

    def pages_for(self, num_tokens: int) -> int:
        """Count the pages that hold `num_tokens` tokens of one request."""
        return pages_for_tokens(num_tokens, self.info.page_size)

    def status(self, **measured: float | int) -> InstanceStatus:
        """Telemetry for the driver and displays; `measured` adds what only the engine knows (times, steps)."""
        return InstanceStatus(
            instance_id=self.info.instance_id,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_free_pages=self._num_available_pages,
            num_total_pages=self.info.num_total_pages,
            num_generated_tokens=self.num_generated_tokens,
            num_prefilled_tokens=self.num_prefilled_tokens,
            num_reprefilled_tokens=self.num_reprefilled_tokens,
            num_shared_tokens=self.num_shared_tokens,
            num_imported_tokens=self.num_imported_tokens,
            num_preemptions=self.num_preemptions,
            max_kv_utilization=self.max_used_pages / self.info.num_total_pages,
            **measured,
        )

    def start_iteration(self) -> None:
        """Forget all parked KV and start the counters of a new iteration."""
        for request_id in list(self.parked):
            self.unpark(request_id)
        self.num_preemptions = self.num_generated_tokens = 0
        self.num_prefilled_tokens = self.num_reprefilled_tokens = 0
        self.num_shared_tokens = self.num_imported_tokens = 0
        self.max_used_pages = 0

    def _grow_pages(self) -> int:
        """Give growing sequences pages for the coming steps; returns how many steps all can take."""
        growing = [s for s in self.running if not s.chunk.num_reserved_pages]
        for sequence in sorted(growing, key=lambda s: s.order):
            rank = self.ranks[sequence.rank]
            while sequence in self.running and not rank.has_room(self._num_missing(sequence, 1)):
                others = (s for s in self.running if s.rank == sequence.rank and not s.chunk.num_reserved_pages)
                self._preempt(max(others, key=lambda s: s.order))
            if sequence in self.running:
                sequence.pages += rank.allocate(self._num_missing(sequence, 1))
        growing = [s for s in growing if s in self.running]
        num_steps = self.max_steps_per_dispatch
        while num_steps > 1 and not self._have_room(growing, num_steps):
            num_steps //= 2
        for sequence in growing:
            sequence.pages += self.ranks[sequence.rank].allocate(self._num_missing(sequence, num_steps))
        self._note_usage()
        return num_steps

    def _have_room(self, growing: SequenceOf[Sequence], num_steps: int) -> bool:
        """Whether all growing sequences can have pages for so many steps."""
        missing = [0 for _ in self.ranks]
        for sequence in growing:
            missing[sequence.rank] += self._num_missing(sequence, num_steps)
        return all(rank.has_room(count) for rank, count in zip(self.ranks, missing, strict=True))

    def _num_missing(self, sequence: Sequence, num_steps: int) -> int:
        """Pages that `num_steps` decode steps write beyond those owned; step k writes position num_tokens + k - 2."""
        last = min(sequence.num_tokens + num_steps - 1, sequence.limit)
        return max(0, self.pages_for(last) - len(sequence.pages))

    def _num_pages(self, sequence: Sequence, rank: RankPages) -> tuple[int, int]:
        """Pages that a sequence gets at admission to a rank, and pages that must stay free."""
        if sequence.chunk.num_reserved_pages:
            return sequence.chunk.num_reserved_pages, 0
        # Growing sequences leave a hundredth of the pages free, as in vLLM, or they preempt each other at once.
        return self.pages_for(sequence.num_tokens), 1 + rank.pool.num_total_pages // 100 if rank.num_running else 0

    def _find_rank(self, sequence: Sequence) -> int | None:
        """Choose where the first in the queue runs; None if it has to wait."""
        request_id = sequence.chunk.request_id
        choices = []
        for index, rank in enumerate(self.ranks):
            if rank.num_running == self._rank_slots:
                continue
            room = rank.room_for(sequence.chunk)
            if sum(self._num_pages(sequence, rank)) <= room:
                choices.append((request_id in rank.parked, room, -index))
            elif request_id in rank.parked:
                rank.parked.move_to_end(request_id)
        if not choices:
            return None
        is_home, _, index = max(choices)
        if not is_home:
            for rank in self.ranks:
                rank.evict(request_id)
        return -index

    def _find_prompt_leader(self, sequence: Sequence, excluded: Container[Sequence]) -> Sequence:
        """Return the sibling that is furthest with the prompt that a sequence still lacks; itself if none is ahead."""
        if sequence.num_computed >= sequence.num_sharable:
            return sequence
        prompt = sequence.chunk.token_ids[: sequence.num_sharable]
        siblings = [
            other
            for other in self.running
            if other.rank == sequence.rank
            and other.chunk.request_id.group_id == sequence.chunk.request_id.group_id
            and other not in excluded
            and np.array_equal(other.token_ids[: min(len(prompt), other.num_tokens)], prompt)
        ]
        return max(siblings, key=lambda other: other.num_computed)

    def _copy_prompt(self, leader: Sequence, sequence: Sequence) -> list[tuple[int, int]]:
        """Take over a sibling's prompt KV; returns the pages to copy. Tokens past the prompt are overwritten later."""
        count = sequence.num_sharable
        num_pages = self.pages_for(count)
        self.num_shared_tokens += count - sequence.num_computed
        sequence.note_kv(count)
        pairs = zip(leader.pages[:num_pages], sequence.pages[:num_pages], strict=True)
        return [(source, target) for source, target in pairs if source != target]

    def _note_present(self, sequence: Sequence, parked: ParkedKV | None) -> None:
        """Note what KV lies in the pages of an admitted sequence already."""
        if parked:
            sequence.note_kv(len(parked.token_ids))
        elif num_shared := self._num_computed(sequence.prompt):
            self.num_shared_tokens += num_shared
            sequence.note_kv(num_shared)

    def _num_computed(self, prompt: SharedPrompt | None) -> int:
        """Tokens of a prompt whose KV lies in its pages: all or, while the first sibling is at it, none."""
        if prompt is None:
            return 0
        size = len(prompt.token_ids)
        siblings = (other for other in self.running if other.prompt is prompt)
        return size if prompt.num_parked or any(other.num_computed >= size for other in siblings) else 0

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.ranks[sequence.rank].free(sequence)
        sequence.num_lost = max(sequence.num_lost, sequence.num_computed)
        sequence.num_computed = 0
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)
        self.num_preemptions += 1

    def _retire(self, sequence: Sequence) -> None:
        if sequence.finish_reason is None:
            raise ProtocolError(f"{sequence.chunk.request_id} still runs")
        self.running.remove(sequence)

    @property
    def _num_available_pages(self) -> int:
        return sum(rank.num_available_pages for rank in self.ranks)

    def _note_usage(self) -> None:
        self.max_used_pages = max(self.max_used_pages, self.info.num_total_pages - self._num_available_pages)
