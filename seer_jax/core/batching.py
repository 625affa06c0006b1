"""Continuous batching of one instance: which sequences run in the next step, on which pages.

Pure host logic: the engine and the simulator drive the same `BatchPlanner`. It serves chunks with reserved pages (Seer:
never preempted) and chunks that grow on demand (the baseline: the youngest is preempted when pages run out).
"""

import bisect
from collections import OrderedDict
from collections.abc import Container
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from seer_jax.core.errors import ProtocolError
from seer_jax.core.kv.page_pool import PagePool
from seer_jax.core.kv.shared_prompts import ParkedKV, SharedPrompt, SharedPrompts
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.types import InstanceInfo, InstanceStatus, RequestChunk, RequestId


@dataclass(frozen=True, kw_only=True)
class PrefillSlice:
    """`count` tokens of a sequence from position `start`, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the slice ends at the newest known token, so that the step samples the next one."""
        return self.start + self.count == self.sequence.num_tokens


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one dispatch computes.

    Attributes:
        decodes: Sequences with one pending token.
        prefills: Slices of sequences with more.
        num_steps: Decode steps at most before the host must look again.
        copies: (source page, target page) to be copied in all layers before the step.
    """

    decodes: SequenceOf[Sequence]
    prefills: SequenceOf[PrefillSlice]
    num_steps: int
    copies: SequenceOf[tuple[int, int]] = ()


class BatchPlanner:
    """Admits chunks, hands out pages, plans steps, books results.

    A cycle is `admit` (then import KV of the admitted), `plan`, run, `commit`, `release` or `park` of what finished.
    Requests of a group have the full pages of their prompt in common and write into none of them but to compute them;
    the rest of the prompt is copied from a sibling that runs at the same time instead of computing it again.

    Attributes:
        parked: KV of paused requests, in order of eviction: the one parked longest first, except that the first in the
            queue keeps its own to the last. Its pages count as free: whoever needs them gets them.
        evicted: Parked KV whose pages were given away since the caller last emptied this list. Their content is intact
            until the next import, copy or step.

    Invariants: a page is free, parked, owned by one running sequence or by a prompt (`SharedPrompts`); a sequence with
    reserved pages is never preempted; a running sequence has a page for every position that the planned steps write.
    """

    def __init__(
        self, info: InstanceInfo, *, max_prefill_tokens: int, prefill_tile: int, max_steps_per_dispatch: int
    ) -> None:
        """Start empty.

        Args:
            info: Capacity of the instance.
            max_prefill_tokens: Prefill tokens per step at most, every slice rounded up to whole tiles.
            prefill_tile: Tokens per prefill tile.
            max_steps_per_dispatch: Decode steps per dispatch at most.
        """
        self.info = info
        self.pool = PagePool(info.num_total_pages + 1, info.page_size)  # + the garbage page
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: OrderedDict[RequestId, ParkedKV] = OrderedDict()
        self.evicted: list[tuple[RequestId, ParkedKV]] = []
        self._prompts = SharedPrompts(self.pool)
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

        Returns:
            The admitted; their `num_computed` is what was parked here, and may be raised by whoever imports their KV.
        """
        admitted = []
        while self.waiting and len(self.running) < self.info.max_num_seqs:
            sequence = self.waiting[0]
            num_pages = sequence.chunk.num_reserved_pages or self.pool.pages_for(sequence.num_tokens)
            # Growing sequences leave a hundredth of the pages free, as in vLLM, or they preempt each other at once.
            spare = 0 if sequence.chunk.num_reserved_pages or not self.running else 1 + self.pool.num_total_pages // 100
            request_id = sequence.chunk.request_id
            parked = self.parked.pop(request_id, None)
            prompt = parked.prompt if parked else self._prompts.find(sequence.chunk)
            pages = parked.pages if parked else prompt.pages if prompt else []
            if prompt:
                prompt.num_running += 1  # So that nobody gets its pages.
            num_missing = num_pages - len(pages)
            if not self._make_room(num_missing + spare):
                if prompt:
                    prompt.num_running -= 1
                if parked:
                    self.parked[request_id] = parked
                break
            self.waiting.pop(0)
            sequence.pages = pages + self.pool.allocate(num_missing)
            sequence.prompt = prompt or (None if parked else self._prompts.start(sequence.chunk, sequence.pages))
            self._note_present(sequence, parked)
            if parked and prompt:
                self._prompts.leave(prompt, was_running=False)
            self.running.append(sequence)
            admitted.append(sequence)
        self._note_usage()
        return admitted

    def num_present(self, chunk: RequestChunk) -> int:
        """Leading tokens of a chunk that waits whose KV siblings have here; they may be gone when it is admitted."""
        return self._num_computed(self._prompts.find(chunk))

    def plan(self) -> StepPlan | None:
        """Plan the next dispatch; None when nothing runs. May preempt growing sequences, youngest first."""
        num_steps = self._grow_pages()
        decodes, prefills, budget, is_prefilling = [], [], self.max_prefill_tokens, False
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
            count = min(sequence.num_pending, budget)
            is_prefilling |= count < sequence.num_pending
            if count:
                prefills.append(PrefillSlice(sequence=sequence, start=sequence.num_computed, count=count))
                budget -= -(-count // self.prefill_tile) * self.prefill_tile
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
        self._free(sequence)

    def park(self, sequence: Sequence) -> None:
        """Release a sequence whose request goes on later; its KV stays while nobody needs the pages."""
        self._retire(sequence)
        used, prompt = self.pool.pages_for(sequence.num_computed), sequence.prompt
        if prompt:
            prompt.num_parked += 1
        kept, sequence.pages = sequence.pages[:used], sequence.pages[: _num_shared(prompt)] + sequence.pages[used:]
        self.parked[sequence.chunk.request_id] = ParkedKV(
            pages=kept,
            token_ids=sequence.token_ids[: sequence.num_computed],
            priority=sequence.chunk.priority,
            prompt=prompt,
        )
        self._free(sequence)

    def unpark(self, request_id: RequestId) -> ParkedKV | None:
        """Give up a request's parked KV; the pages are free, their content is intact until something is written."""
        parked = self.parked.pop(request_id, None)
        if parked is not None:
            self._leave(parked.pages, parked.prompt, was_running=False)
        return parked

    def status(self, **measured: float | int) -> InstanceStatus:
        """Telemetry for the driver and displays; `measured` adds what only the engine knows (times, steps)."""
        return InstanceStatus(
            instance_id=self.info.instance_id,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_free_pages=self._num_available_pages,
            num_total_pages=self.pool.num_total_pages,
            num_generated_tokens=self.num_generated_tokens,
            num_prefilled_tokens=self.num_prefilled_tokens,
            num_reprefilled_tokens=self.num_reprefilled_tokens,
            num_shared_tokens=self.num_shared_tokens,
            num_imported_tokens=self.num_imported_tokens,
            num_preemptions=self.num_preemptions,
            max_kv_utilization=self.max_used_pages / self.pool.num_total_pages,
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
            while sequence in self.running and not self._make_room(self._num_missing(sequence, 1)):
                self._preempt(max((s for s in self.running if not s.chunk.num_reserved_pages), key=lambda s: s.order))
            if sequence in self.running:
                sequence.pages += self.pool.allocate(self._num_missing(sequence, 1))
        growing = [s for s in growing if s in self.running]
        num_steps = self.max_steps_per_dispatch
        while num_steps > 1 and not self._make_room(sum(self._num_missing(s, num_steps) for s in growing)):
            num_steps //= 2
        for sequence in growing:
            sequence.pages += self.pool.allocate(self._num_missing(sequence, num_steps))
        self._note_usage()
        return num_steps

    def _num_missing(self, sequence: Sequence, num_steps: int) -> int:
        """Pages that `num_steps` decode steps write beyond those owned; step k writes position num_tokens + k - 2."""
        last = min(sequence.num_tokens + num_steps - 1, sequence.limit)
        return max(0, self.pool.pages_for(last) - len(sequence.pages))

    def _find_prompt_leader(self, sequence: Sequence, excluded: Container[Sequence]) -> Sequence:
        """Return the sibling that is furthest with the prompt that a sequence still lacks; itself if none is ahead."""
        if sequence.num_computed >= sequence.num_sharable:
            return sequence
        prompt = sequence.chunk.token_ids[: sequence.num_sharable]
        siblings = [
            other
            for other in self.running
            if other.chunk.request_id.group_id == sequence.chunk.request_id.group_id
            and other not in excluded
            and np.array_equal(other.token_ids[: min(len(prompt), other.num_tokens)], prompt)
        ]
        return max(siblings, key=lambda other: other.num_computed)

    def _copy_prompt(self, leader: Sequence, sequence: Sequence) -> list[tuple[int, int]]:
        """Take over a sibling's prompt KV; returns the pages to copy. Tokens past the prompt are overwritten later."""
        count = sequence.num_sharable
        num_pages = self.pool.pages_for(count)
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
        self._free(sequence)
        sequence.num_lost = max(sequence.num_lost, sequence.num_computed)
        sequence.num_computed = 0
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)
        self.num_preemptions += 1

    def _retire(self, sequence: Sequence) -> None:
        if sequence.finish_reason is None:
            raise ProtocolError(f"{sequence.chunk.request_id} still runs")
        self.running.remove(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._leave(sequence.pages, sequence.prompt, was_running=True)
        sequence.pages, sequence.prompt = [], None

    def _leave(self, pages: list[int], prompt: SharedPrompt | None, *, was_running: bool) -> None:
        self.pool.free(pages[_num_shared(prompt) :])
        if prompt:
            self._prompts.leave(prompt, was_running=was_running)

    @property
    def _num_available_pages(self) -> int:
        own = sum(len(parked.pages) - _num_shared(parked.prompt) for parked in self.parked.values())
        return self.pool.num_free_pages + self._prompts.num_idle_pages + own

    def _make_room(self, num_pages: int) -> bool:
        """Evict parked KV, the oldest first, until so many pages are free; False if not even all of it would do."""
        if num_pages > self.pool.num_free_pages and num_pages > self._num_available_pages:
            return False
        while num_pages > self.pool.num_free_pages:
            request_id, parked = self.parked.popitem(last=False)
            self._leave(parked.pages, parked.prompt, was_running=False)
            self.evicted.append((request_id, parked))
        return True

    def _note_usage(self) -> None:
        self.max_used_pages = max(self.max_used_pages, self.pool.num_total_pages - self._num_available_pages)


def _num_shared(prompt: SharedPrompt | None) -> int:
    return len(prompt.pages) if prompt else 0
