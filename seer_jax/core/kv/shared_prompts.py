"""Pages that outlast a chunk on an instance: a paused request's, and those that a group's requests have in common.

The latter are the full pages of their prompt. Such a page holds prompt tokens only and is written by whoever computes
the prompt there; what follows in a request has pages of its own, beginning with the prompt's partial page.
"""

from dataclasses import dataclass

import numpy as np

from seer_jax.core.kv.page_pool import PagePool
from seer_jax.core.types import RequestChunk, TokenIds


@dataclass(eq=False, kw_only=True)
class SharedPrompt:
    """Pages of one prompt and who has them.

    Attributes:
        group_id: The group.
        pages: KV pages, in order of position.
        token_ids: int32 [pages x page size]; the tokens in them.
        num_running: Running sequences.
        num_parked: Paused requests whose KV is still on the instance.
    """

    group_id: int
    pages: list[int]
    token_ids: TokenIds
    num_running: int = 0
    num_parked: int = 0


@dataclass(frozen=True, kw_only=True)
class ParkedKV:
    """Pages that a paused request left on the instance, for its next chunk: the KV of its first tokens.

    `pages` are in order of position, the first may be `prompt`'s; `priority` is that of the chunk that ended.
    """

    pages: list[int]
    token_ids: TokenIds
    priority: int = 0
    prompt: SharedPrompt | None = None


class SharedPrompts:
    """The shared prompts of an instance.

    Invariant: a prompt has its pages of the pool as long as somebody runs or is parked that shares it.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._by_group: dict[int, SharedPrompt] = {}

    @property
    def num_idle_pages(self) -> int:
        """Pages that only parked requests have."""
        return sum(len(prompt.pages) for prompt in self._by_group.values() if not prompt.num_running)

    def find(self, chunk: RequestChunk) -> SharedPrompt | None:
        """What siblings have of a chunk's prompt; None if nothing, or if it is another prompt."""
        prompt = self._by_group.get(chunk.request_id.group_id) if chunk.num_shared_pages else None
        if prompt and np.array_equal(prompt.token_ids, chunk.token_ids[: len(prompt.token_ids)]):
            return prompt
        return None

    def start(self, chunk: RequestChunk, pages: list[int]) -> SharedPrompt | None:
        """Let the first pages of a running sequence be its group's; None if the chunk shares none."""
        group_id, num_shared = chunk.request_id.group_id, chunk.num_shared_pages
        if not num_shared or group_id in self._by_group:
            return None
        token_ids = chunk.token_ids[: num_shared * self._pool.page_size]
        prompt = SharedPrompt(group_id=group_id, pages=pages[:num_shared], token_ids=token_ids, num_running=1)
        self._by_group[group_id] = prompt
        return prompt

    def leave(self, prompt: SharedPrompt, *, was_running: bool) -> None:
        """Note that a sequence or a parked request has left; the last one gives the pages back."""
        if was_running:
            prompt.num_running -= 1
        else:
            prompt.num_parked -= 1
        if not prompt.num_running and not prompt.num_parked:
            del self._by_group[prompt.group_id]
            self._pool.free(prompt.pages)
