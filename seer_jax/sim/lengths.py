"""How long responses are: drawn from a law, or from a trace.

Lengths of a group resemble each other. The law: log length = mu + sigma x (sqrt(c) x z of the group + sqrt(1 - c) x z
of the request), clipped to 1 .. limit, with mu such that the mean after clipping is the one wanted.

Measured spreads of log length (standard deviation sigma, share c of the variance that lies between groups):
rg_llama3b_rl_step800 0.46, 0.36; rg_llama3b_rl_step400 0.70, 0.42 (50 responses each to 35 problems);
qwen25math_math100_n8 0.45, 0.81 (8 each to 20); AIME, distilled 1.5B model 0.55, 0.57-0.63 (8 each to 596).
"""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seer_jax.core.errors import ConfigError

MAX_SIGMA = 10.0
"""A spread beyond it is a mistake, and would overflow."""
BISECTIONS = 200
"""Halvings of an interval; more than a float64 has bits."""


@dataclass(frozen=True, kw_only=True)
class LengthSpec:
    """Lengths of the responses of a workload, in tokens.

    Attributes:
        mean: Mean after clipping.
        limit: Longest.
        sigma: Standard deviation of the log length, before clipping.
        correlation: Share of its variance that lies between groups, 0 to 1.
        trace: File with lengths to draw from instead, `.npz` or `.jsonl`, see `read_trace`; scaled so that the mean
            after clipping is `mean`. Then `sigma` and `correlation` do nothing.

    Raises:
        ConfigError: If no lengths are like that.
    """

    mean: float
    limit: int
    sigma: float
    correlation: float
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise ConfigError("requests.limit", f"is {self.limit}", "at least 2 tokens")
        if not 1 < self.mean < self.limit:
            hint = f"above 1 and below the limit of {self.limit}, at which lengths are cut"
            raise ConfigError("requests.mean_length", f"is {self.mean}", hint)
        if not 0 < self.sigma <= MAX_SIGMA:
            raise ConfigError("requests.sigma", f"is {self.sigma}", f"above 0, at most {MAX_SIGMA:g}")
        if not 0 <= self.correlation <= 1:
            raise ConfigError("requests.correlation", f"is {self.correlation}", "between 0 and 1")


def sample_lengths(lengths: LengthSpec, num_groups: int, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the lengths of all requests of an iteration.

    A trace with groups gives whole groups in random order, each once before any comes again, and `group_size`
    different members of each. A trace without groups gives single requests with replacement: **its lengths then have
    no structure**.

    Args:
        lengths: What they are like.
        num_groups: Groups.
        group_size: Requests of each.
        rng: Same state, same lengths.

    Returns:
        int64 [num_groups, group_size], 1 to `lengths.limit`.

    Raises:
        ConfigError: If a trace cannot be read, or its groups are smaller than `group_size`.
    """
    if lengths.trace is not None:
        drawn = _sample_trace(lengths, num_groups, group_size, rng)
    else:
        of_group = rng.standard_normal((num_groups, 1)) * math.sqrt(lengths.correlation)
        of_request = rng.standard_normal((num_groups, group_size)) * math.sqrt(1 - lengths.correlation)
        drawn = np.exp(solve_mu(lengths) + lengths.sigma * (of_group + of_request))
    return np.clip(np.rint(np.minimum(drawn, lengths.limit)), 1, lengths.limit).astype(np.int64)


def solve_mu(lengths: LengthSpec) -> float:
    """Mean of the log length before clipping, at which the mean length after clipping is `lengths.mean`."""
    limit, sigma = math.log(lengths.limit), lengths.sigma
    return _bisect(lambda mu: _clipped_mean(mu, sigma, lengths.limit), lengths.mean, -9 * sigma, limit + 9 * sigma)


def read_trace(file: str | Path) -> tuple[np.ndarray, ...] | np.ndarray:
    """Read recorded lengths.

    Args:
        file: `.npz` with integers `lengths` [groups, size], or `offsets` [n + 1] and `group` [n] (recorded responses);
            or `.jsonl`, `.jsonl.gz` with a number `length` and a `group` on every line, or `output_length` (Mooncake).

    Returns:
        int64 lengths of each group, or of all requests if nothing says which belong together.

    Raises:
        ConfigError: If it is something else; names the file and the field.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError("trace", f"no file {str(file)!r}", "give the path of a .npz or .jsonl file")
    if path.suffix == ".npz":
        return _read_arrays(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path)
    raise ConfigError("trace", f"{path} is of no known kind", "a .npz, .jsonl or .jsonl.gz file")


def _sample_trace(lengths: LengthSpec, num_groups: int, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths from a trace, scaled but neither clipped nor rounded."""
    trace = read_trace(lengths.trace)
    groups = [trace] if isinstance(trace, np.ndarray) else trace
    # Every group is drawn as often as any other, so a request of a large one counts less.
    flat = np.concatenate(groups).astype(np.float64)
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups]) / len(groups)
    factor = math.exp(
        _bisect(
            lambda log: float(np.clip(flat * math.exp(log), 1, lengths.limit) @ weights),
            lengths.mean,
            -math.log(flat.max()),
            math.log(lengths.limit / flat.min()),
        )
    )
    if isinstance(trace, np.ndarray):
        return factor * rng.choice(trace, (num_groups, group_size))
    smallest = min(len(group) for group in groups)
    if smallest < group_size:
        problem = f"{lengths.trace} has a group of {smallest}, {group_size} are to be drawn"
        raise ConfigError("trace", problem, "record more, or make the groups smaller")
    rounds = -(-num_groups // len(groups))
    order = np.concatenate([rng.permutation(len(groups)) for _ in range(rounds)])[:num_groups]
    return factor * np.stack([rng.choice(groups[index], group_size, replace=False) for index in order])


def _read_arrays(path: Path) -> tuple[np.ndarray, ...]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("lengths", "offsets", "group") if name in file.files}
            names = ", ".join(file.files)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, BadZipFile) as error:
        raise ConfigError("trace", f"{path} cannot be read: {error}", "write it with numpy.savez") from error
    if "lengths" in arrays:
        lengths = arrays["lengths"]
        if lengths.ndim != 2 or lengths.dtype.kind not in "iu" or not lengths.size:
            problem = f"`lengths` of {path} is {lengths.dtype} {list(lengths.shape)}"
            raise ConfigError("trace", problem, "integers [groups, size]")
        groups = tuple(lengths.astype(np.int64))
    elif {"offsets", "group"} <= set(arrays):
        lengths, group = np.diff(arrays["offsets"]).astype(np.int64), arrays["group"]
        if group.shape != lengths.shape or not lengths.size:
            problem = f"`group` of {path} has {group.size} entries, `offsets` bounds {lengths.size} responses"
            raise ConfigError("trace", problem, "one group per response")
        groups = tuple(lengths[group == index] for index in np.unique(group))
    else:
        raise ConfigError("trace", f"{path} holds {names or 'nothing'}", "needs an array `lengths`")
    _check_positive(groups, path)
    return groups


def _read_lines(path: Path) -> tuple[np.ndarray, ...] | np.ndarray:
    groups: dict[object, list[int]] = {}
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                group, length = _read_line(line, f"line {number} of {path}")
                groups.setdefault(group, []).append(length)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError("trace", f"{path} cannot be read: {error}", "JSON, an object per line") from error
    if not groups:
        raise ConfigError("trace", f"{path} is empty", "one request per line")
    if None in groups and len(groups) > 1:
        raise ConfigError("trace", f"only some lines of {path} have a `group`", "all, or none")
    arrays = tuple(np.array(group, np.int64) for group in groups.values())
    _check_positive(arrays, path)
    return arrays[0] if None in groups else arrays


def _read_line(line: str, where: str) -> tuple[object, int]:
    """Group, None if it has none, and length."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError("trace", f"{where} is no JSON: {error}", "an object per line") from error
    names = [name for name in ("length", "output_length") if isinstance(values, dict) and name in values]
    if not names or type(values[names[0]]) is not int:
        problem = f"`{names[0]}` of {where} is {values[names[0]]!r}" if names else f"{where} has no `length`"
        raise ConfigError("trace", problem, "an integer `length`, or `output_length`")
    group = values.get("group")
    if group is not None and type(group) not in (int, str):
        raise ConfigError("trace", f"`group` of {where} is {group!r}", "an integer or text")
    return group, values[names[0]]


def _check_positive(groups: Sequence[np.ndarray], path: Path) -> None:
    shortest = min(int(group.min()) for group in groups)
    if shortest < 1:
        raise ConfigError("trace", f"{path} has a length of {shortest}", "at least 1 token")


def _clipped_mean(mu: float, sigma: float, limit: int) -> float:
    """Mean of a log-normal value after clipping to 1 .. limit; exact."""
    low, high = -mu / sigma, (math.log(limit) - mu) / sigma
    between = math.exp(mu + sigma**2 / 2) * (_normal_cdf(high - sigma) - _normal_cdf(low - sigma))
    return _normal_cdf(low) + between + limit * _normal_cdf(-high)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a rising function has a value."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
