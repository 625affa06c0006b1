"""Hints for misspelt names."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Name the closest candidate, or all of them when none is close.

    Args:
        word: What the user wrote.
        candidates: What would have been right.

    Returns:
        `did you mean X?`, or `one of X, Y, Z`.
    """
    names = sorted(candidates)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(names)}"
