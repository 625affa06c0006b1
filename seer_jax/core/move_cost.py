"""Whether KV that exists elsewhere is brought over or computed again: whichever took less time so far."""

DECAY = 0.9
"""Weight of a measurement beside the next one."""
MAX_DECLINED = 16
"""After so many moves declined in a row one is made all the same: what was measured may have been a bad moment."""


class LinearCost:
    """Seconds by size: a fixed part and a part per unit, least squares over what was measured lately.

    One thread may note while others estimate.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # Weights, sizes, seconds, squares of sizes, sizes x seconds.

    def note(self, size: int, seconds: float) -> None:
        """Take in a measurement."""
        new = (1.0, size, seconds, size * size, size * seconds)
        self._sums = tuple(DECAY * old + value for old, value in zip(self._sums, new, strict=True))

    def estimate(self, size: int) -> float | None:
        """Seconds for `size` units; None before the first measurement."""
        weight, sizes, seconds, squares, products = self._sums
        if not weight:
            return None
        mean_size, mean_s = sizes / weight, seconds / weight
        variance = squares / weight - mean_size**2
        if variance <= 1e-6 * mean_size**2:  # One size only: what it took is all that is known.
            return mean_s * max(1.0, size / mean_size) if mean_size else mean_s
        slope = max(0.0, (products / weight - mean_size * mean_s) / variance)
        fixed = mean_s - slope * mean_size
        return fixed + slope * size if fixed >= 0 else mean_s / mean_size * size


class MoveCosts:
    """Compares moving KV with computing it again, by rates measured on this instance. No token depends on it.

    Attributes:
        move: Seconds by bytes that came from the pool.
        prefill: Seconds by tokens of a step that prefills.
        num_declined: Moves that would have taken longer, since the caller last set it.
    """

    def __init__(self, max_prefill_tokens: int, *, always_moves: bool) -> None:
        """Know nothing yet; until both have been measured, KV is moved.

        Args:
            max_prefill_tokens: Most tokens that a step prefills.
            always_moves: Move whatever was measured.
        """
        self.move, self.prefill = LinearCost(), LinearCost()
        self.num_declined = self._num_in_a_row = 0
        self._max_prefill_tokens, self._always_moves = max_prefill_tokens, always_moves

    def moving_pays(self, num_tokens: int, num_bytes: int, *, was_declined: bool = False) -> bool:
        """Whether to move the KV of `num_tokens` tokens; a no counts as a declined move.

        With `was_declined` the answer takes the place of a no that less of the same KV got.
        """
        if was_declined:
            self.num_declined -= 1
            self._num_in_a_row = max(0, self._num_in_a_row - 1)
        move_s, prefill_s = self.move.estimate(num_bytes), self._prefill_s(num_tokens)
        pays = self._always_moves or move_s is None or prefill_s is None or move_s <= prefill_s
        if pays or self._num_in_a_row >= MAX_DECLINED:
            self._num_in_a_row = 0
            return True
        self._num_in_a_row += 1
        self.num_declined += 1
        return False

    def _prefill_s(self, num_tokens: int) -> float | None:
        num_full, rest = divmod(num_tokens, self._max_prefill_tokens)
        full_s, rest_s = self.prefill.estimate(self._max_prefill_tokens), self.prefill.estimate(rest)
        if full_s is None or rest_s is None:
            return None
        return num_full * full_s + (rest_s if rest else 0.0)
