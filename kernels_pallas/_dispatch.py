"""Choice among the implementations of a kernel."""

from collections.abc import Callable, Mapping
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def select(kernel: str, implementations: Mapping[str, F], implementation: str | None) -> F:
    """Return the implementation that was named, or the best one for None.

    Args:
        kernel: Name of the kernel, for the error.
        implementations: What exists, best first.
        implementation: A key of `implementations`; a named one never falls back. None takes the first.

    Returns:
        The function to call.

    Raises:
        ValueError: If there is no implementation of that name.
    """
    if implementation is None:
        return next(iter(implementations.values()))
    if implementation not in implementations:
        raise ValueError(f"{kernel}: no implementation {implementation!r}, there are {', '.join(implementations)}")
    return implementations[implementation]
