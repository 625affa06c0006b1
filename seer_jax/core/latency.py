"""How long a step takes: what a draft budget is weighed with.

Source: the offline profile that Algorithm 1 of Seer asks for T(B, gamma).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

from seer_jax.core.errors import ConfigError

PATH = "speculation.profile"
NUM_CONTEXTS = 2
FIELDS = ("device", "model", "jax", "contexts", "plain_sizes", "plain_s", "verify_sizes", "verify_s")


@runtime_checkable
class StepTimeModel(Protocol):
    """Seconds that a step takes; infinity if it does not fit."""

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        """One decode step of `num_seqs` requests within a dispatch of many steps.

        Args:
            num_seqs: Requests.
            mean_context: Mean of their tokens.
        """
        ...

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        """One verification step, its dispatch and host work included.

        Args:
            num_seqs: Requests.
            num_tokens: Tokens to verify, the newest one of each request included; an array asks for many at once.
            mean_context: Mean tokens of the requests.

        Returns:
            A float, or float64 of the shape of `num_tokens`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class MeasuredStepTimes:
    """Step times measured on an engine, at two contexts for every program that it compiles.

    A shape runs in the smallest program that holds it, and takes that program's time. Time is linear in the context,
    and at least that of the shorter context. Programs that were measured to be faster than a smaller one are taken to
    be as slow: the difference is noise, and would make the policy pad for nothing.

    Attributes:
        device: What it was measured on.
        model: Fingerprint of what was measured, free-form.
        jax: Version of jax.
        contexts: The two mean contexts, in tokens, ascending.
        plain_sizes: Requests that each decode program holds, ascending.
        plain_s: Seconds of one step of each, at both contexts.
        verify_sizes: Tokens that each verification program holds, ascending.
        verify_s: Seconds of each, at both contexts.

    Raises:
        ConfigError: If sizes do not ascend or a time is missing, not positive or not finite.
    """

    device: str
    model: str
    jax: str
    contexts: tuple[int, int]
    plain_sizes: tuple[int, ...]
    plain_s: tuple[tuple[float, float], ...]
    verify_sizes: tuple[int, ...]
    verify_s: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for name in ("contexts", "plain_sizes", "verify_sizes"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
                raise ConfigError(PATH, f"{name} is {list(sizes)}", "positive, ascending")
        for name in ("plain", "verify"):
            sizes, times = getattr(self, f"{name}_sizes"), getattr(self, f"{name}_s")
            if len(times) != len(sizes):
                raise ConfigError(PATH, f"{name}_s holds {len(times)} programs, {name}_sizes {len(sizes)}")
            if not all(0 < seconds < math.inf for pair in times for seconds in pair):
                raise ConfigError(PATH, f"{name}_s is {[list(pair) for pair in times]}", "seconds, all above 0")

    def plain_step_s(self, num_seqs: int, mean_context: float) -> float:
        """See `StepTimeModel`."""
        return float(_times(self._plain, self.contexts, num_seqs, mean_context))

    def verify_step_s(self, num_seqs: int, num_tokens: int | np.ndarray, mean_context: float) -> float | np.ndarray:
        """See `StepTimeModel`; `num_seqs` makes no difference, a program's tokens do."""
        seconds = _times(self._verify, self.contexts, num_tokens, mean_context)
        return seconds if isinstance(num_tokens, np.ndarray) else float(seconds)

    def to_json(self) -> str:
        """As JSON, a line per field; `from_json` reads it."""
        fields = (f"  {json.dumps(name)}: {json.dumps(getattr(self, name))}" for name in FIELDS)
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "MeasuredStepTimes":
        """Read what `to_json` wrote.

        Raises:
            ConfigError: If it is something else; says what is wrong.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(PATH, f"no JSON: {error}", "measure again") from error
        if not isinstance(values, dict) or set(values) != set(FIELDS):
            found = ", ".join(sorted(values)) if isinstance(values, dict) else type(values).__name__
            raise ConfigError(PATH, f"holds {found}", "exactly " + ", ".join(FIELDS))
        for name in ("device", "model", "jax"):
            if not isinstance(values[name], str):
                raise ConfigError(PATH, f"{name} is {values[name]!r}", "text")
        for name in ("contexts", "plain_sizes", "verify_sizes"):
            values[name] = _tuple_of(int, name, values[name], NUM_CONTEXTS if name == "contexts" else None)
        for name in ("plain_s", "verify_s"):
            pairs = values[name] if isinstance(values[name], list) else [values[name]]
            values[name] = tuple(_tuple_of((float, int), name, pair, NUM_CONTEXTS) for pair in pairs)
        return cls(**values)

    @cached_property
    def _plain(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.plain_sizes), np.array(self.plain_s)

    @cached_property
    def _verify(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.verify_sizes), np.array(self.verify_s)


def _times(
    table: tuple[np.ndarray, np.ndarray], contexts: tuple[int, int], size: int | np.ndarray, context: float
) -> np.ndarray | np.float64:
    """Time of each size at a context, from sizes [n] and seconds [n, 2]."""
    sizes, seconds = table
    short, growth = seconds[:, 0], np.maximum(seconds[:, 1] - seconds[:, 0], 0)
    place = max(0.0, (context - contexts[0]) / (contexts[1] - contexts[0]))
    programs = np.append(np.maximum.accumulate(short + growth * place), math.inf)
    return programs[np.searchsorted(sizes, size)]


def _tuple_of(kinds: type | tuple[type, ...], name: str, value: Any, length: int | None) -> tuple[Any, ...]:
    """A JSON list of numbers as a tuple."""
    is_right = isinstance(value, Sequence) and not isinstance(value, str) and length in (None, len(value))
    if not is_right or not all(isinstance(item, kinds) and not isinstance(item, bool) for item in value):
        kind = "integers" if kinds is int else "seconds"
        raise ConfigError(PATH, f"{name} holds {value!r}", f"{length or 'a list of'} {kind}")
    cast = int if kinds is int else float
    return tuple(cast(item) for item in value)
