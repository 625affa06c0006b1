"""Which KV pages of a rank are free. The host owns allocation; the device only sees page numbers."""

from collections.abc import Iterable

from seer_jax.core.errors import CapacityError, ConfigError, ProtocolError


def pages_for_tokens(num_tokens: int, page_size: int) -> int:
    """Count the pages that hold `num_tokens` tokens of one request; it rounds up."""
    return -(-num_tokens // page_size)


class PagePool:
    """Free list over the KV pages of one rank.

    Pages come out in a deterministic order: 1, 2, 3, ... at first, later the one freed last. `allocate` and `free` cost
    O(1) per page.

    Args:
        num_pages: All of its pages, the garbage page included.
        page_size: Tokens per page.
        garbage_page: The first of them: padding rows of a step write there, and it is never handed out.

    Raises:
        ConfigError: If there is no usable page or no room in a page.

    Invariants: every page except the garbage page is either free or in use, never both.
    """

    def __init__(self, num_pages: int, page_size: int, garbage_page: int = 0) -> None:
        if num_pages < 2:
            raise ConfigError("engine.num_pages", f"is {num_pages}", "at least 2: page 0 is never handed out")
        if page_size < 1:
            raise ConfigError("engine.page_size", f"is {page_size}", "at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._garbage_page = garbage_page
        self._free = list(range(garbage_page + num_pages - 1, garbage_page, -1))
        self._in_use = bytearray(num_pages)

    @property
    def num_total_pages(self) -> int:
        """Pages that can be handed out."""
        return self.num_pages - 1

    @property
    def num_free_pages(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Count the pages that hold `num_tokens` tokens of one request."""
        return pages_for_tokens(num_tokens, self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages out of the pool, all or none.

        Args:
            num_pages: How many; 0 is allowed.

        Returns:
            Page numbers, each above the garbage page's.

        Raises:
            CapacityError: If fewer are free; nothing is taken then.
        """
        if num_pages > len(self._free):
            raise CapacityError("KV allocation", num_pages, len(self._free), "free pages")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._in_use[page - self._garbage_page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back; the first of them is handed out again first.

        Args:
            pages: Page numbers from `allocate`, each once.

        Raises:
            ProtocolError: If a page is unknown or already free; nothing is given back then.
        """
        returned = list(pages)
        first = self._garbage_page
        bad = [page for page in returned if not (0 < page - first < self.num_pages and self._in_use[page - first])]
        if bad or len(set(returned)) != len(returned):
            raise ProtocolError(f"pages {bad or returned} are not in use or are freed twice")
        for page in returned:
            self._in_use[page - first] = 0
        self._free.extend(reversed(returned))
