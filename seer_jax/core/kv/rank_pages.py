"""The KV pages of one data-parallel rank: free, a running sequence's, a group's prompt, or a paused request's."""

from collections import OrderedDict
from dataclasses import dataclass

from seer_jax.core.kv.page_pool import PagePool
from seer_jax.core.kv.shared_prompts import SharedPrompt, SharedPrompts
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestChunk, RequestId, TokenIds


@dataclass(frozen=True, kw_only=True)
class ParkedKV:
    """Pages that a paused request left on the instance, for its next chunk: the KV of its first tokens.

    `pages` are in order of position, the first may be `prompt`'s; `priority` is that of the chunk that ended.
    """

    pages: list[int]
    token_ids: TokenIds
    priority: int = 0
    prompt: SharedPrompt | None = None


class RankPages:
    """The pages of one rank and who has them.

    Args:
        pool: The rank's.
        evicted: Where parked KV goes whose pages are given away.

    Attributes:
        num_running: Sequences that have pages here.
        parked: KV of paused requests, in order of eviction. Its pages count as free: whoever needs them gets them.

    Invariant: a page is free, parked, owned by one running sequence or by a prompt (`SharedPrompts`).
    """

    def __init__(self, pool: PagePool, evicted: list[tuple[RequestId, ParkedKV]]) -> None:
        self.pool = pool
        self.num_running = 0
        self.parked: OrderedDict[RequestId, ParkedKV] = OrderedDict()
        self._evicted = evicted
        self._prompts = SharedPrompts(pool)

    @property
    def num_available_pages(self) -> int:
        """Pages that can be had, free or parked."""
        own = sum(len(parked.pages) - _num_shared(parked.prompt) for parked in self.parked.values())
        return self.pool.num_free_pages + self._prompts.num_idle_pages + own

    def has_room(self, num_pages: int) -> bool:
        """Whether so many pages can be had."""
        return num_pages <= self.pool.num_free_pages or num_pages <= self.num_available_pages

    def find_prompt(self, chunk: RequestChunk) -> SharedPrompt | None:
        """What siblings have here of a chunk's prompt."""
        return self._prompts.find(chunk)

    def room_for(self, chunk: RequestChunk) -> int:
        """Pages that a chunk can have here, those that hold its KV already among them."""
        parked = self.parked.get(chunk.request_id)
        prompt = parked.prompt if parked else self.find_prompt(chunk)
        return self.num_available_pages + (len(prompt.pages) if prompt and prompt.num_running else 0)

    def allocate(self, num_pages: int, spare: int = 0) -> list[int]:
        """Take pages, and leave `spare` more free; evicts parked KV, the oldest first.

        Raises:
            CapacityError: If there is no room for `num_pages`.
        """
        while num_pages + spare > self.pool.num_free_pages and self.parked:
            self.evict(next(iter(self.parked)))
        return self.pool.allocate(num_pages)

    def evict(self, request_id: RequestId) -> None:
        """Give the pages of a request away if it has KV parked here."""
        parked = self.unpark(request_id)
        if parked is not None:
            self._evicted.append((request_id, parked))

    def start(self, sequence: Sequence, num_pages: int, spare: int) -> ParkedKV | None:
        """Give an admitted sequence `num_pages` pages, of those for which `room_for` has room; returns what it parked.

        Args:
            sequence: Gets `pages` and `prompt`.
            num_pages: Pages in all.
            spare: Pages that stay free.
        """
        parked = self.parked.pop(sequence.chunk.request_id, None)
        prompt = parked.prompt if parked else self.find_prompt(sequence.chunk)
        pages = parked.pages if parked else prompt.pages if prompt else []
        if prompt:
            prompt.num_running += 1  # So that nobody gets its pages.
        sequence.pages = pages + self.allocate(num_pages - len(pages), spare)
        sequence.prompt = prompt or (None if parked else self._prompts.start(sequence.chunk, sequence.pages))
        if parked and prompt:
            self._prompts.leave(prompt, was_running=False)
        self.num_running += 1
        return parked

    def free(self, sequence: Sequence) -> None:
        """Take the pages of a sequence that no longer runs."""
        self._leave(sequence.pages, sequence.prompt, was_running=True)
        sequence.pages, sequence.prompt = [], None
        self.num_running -= 1

    def park(self, sequence: Sequence) -> None:
        """Take the pages of a sequence whose request goes on later; its KV stays while nobody needs them."""
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
        self.free(sequence)

    def unpark(self, request_id: RequestId) -> ParkedKV | None:
        """Give up a request's parked KV; the pages are free, their content is intact until something is written."""
        parked = self.parked.pop(request_id, None)
        if parked is not None:
            self._leave(parked.pages, parked.prompt, was_running=False)
        return parked

    def _leave(self, pages: list[int], prompt: SharedPrompt | None, *, was_running: bool) -> None:
        self.pool.free(pages[_num_shared(prompt) :])
        if prompt:
            self._prompts.leave(prompt, was_running=was_running)


def _num_shared(prompt: SharedPrompt | None) -> int:
    return len(prompt.pages) if prompt else 0
