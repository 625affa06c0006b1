"""`seer-jax bench draft`: what the drafter would gain on recorded responses, and what it costs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from seer_jax.cli.arguments import Switch, parse_options
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.draft.automaton import SuffixAutomaton
from seer_jax.core.draft.replay import Acceptance, replay_in_lockstep, replay_with_references
from seer_jax.core.draft.speculate import DraftBatch, SpeculationArgs, address_of, batch_speculate
from seer_jax.core.errors import ConfigError
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.tables import print_summary

BENCHES = ("draft",)
ARRAYS = ("token_ids", "offsets", "group", "prompt_ids", "prompt_offsets")
REQUESTS_PER_GROUP, DELTA_TOKENS, NUM_TIMED_CALLS = 16, 32, 1000
TREE = SpeculationArgs(max_spec_tokens=16, top_k=4)


@dataclass(frozen=True, kw_only=True)
class DraftBenchArguments:
    """Replay recorded responses through the drafter: acceptance by references, latency, size. CPU only, exact."""

    data: str = ""
    """`.npz` with `token_ids` (all responses one after another), `offsets`, `group` (of each response), `prompt_ids`,
    `prompt_offsets` (of each group)."""
    references: str = "0,1,5,15"
    """Complete sibling responses that a request can draft from, one replay each."""
    draft_length: int = 8
    """Tokens of a linear draft, and depth of the fixed beams."""
    every: int = 1
    """Replay only every so-manieth response; 1 = all."""
    json: Switch = False
    """The last line of stdout is one JSON object."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedGroup:
    """One prompt and its recorded responses, int32."""

    prompt: np.ndarray
    responses: list[np.ndarray]


def main(argv: Sequence[str]) -> int:
    """Run a benchmark.

    Args:
        argv: Arguments after `bench`.

    Returns:
        0.

    Raises:
        ConfigError: For bad arguments or a file that does not fit.
    """
    if argv and argv[0] in ("-h", "--help"):
        print("usage: seer-jax bench draft [options]\n\n`seer-jax bench draft --help` lists the options.")
        return 0
    if not argv or argv[0] not in BENCHES:
        name = argv[0] if argv else ""
        raise ConfigError("bench", f"no benchmark {name!r}", did_you_mean(name, BENCHES))
    arguments = parse_options(argv[1:], prog="seer-jax bench draft", defaults=DraftBenchArguments())
    references = _parse_references(arguments.references)
    for name in ("draft_length", "every"):
        if getattr(arguments, name) < 1:
            raise ConfigError(name, f"is {getattr(arguments, name)}", "at least 1")
    groups = load_groups(arguments.data)
    smallest = min(len(group.responses) for group in groups)
    if max(references) >= smallest:
        raise ConfigError("references", f"{max(references)}, but a group has {smallest} responses", "fewer references")
    result = measure_acceptance(groups, references, arguments.draft_length, arguments.every)
    result |= measure_speed(groups, arguments.draft_length)
    if arguments.json:
        print(to_json_line(result))
    else:
        flat = {f"{name} {key}": value for name in ("acceptance", "lockstep", "drafted_per_step")
                for key, value in _flatten(result[name]).items()}  # fmt: skip
        print_summary(flat | {k: v for k, v in result.items() if not isinstance(v, dict)}, title="bench draft")
    return 0


def load_groups(path: str) -> list[RecordedGroup]:
    """Read recorded responses.

    Raises:
        ConfigError: If the file cannot be read, lacks an array, or its offsets do not fit.
    """
    if not Path(path).is_file():
        raise ConfigError("data", f"no file {path!r}", "an .npz of recorded responses")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ARRAYS}
    except (KeyError, ValueError, OSError, EOFError, TypeError, BadZipFile) as error:
        raise ConfigError("data", f"{path}: {error}", "an .npz with " + ", ".join(ARRAYS)) from error
    for name, array in arrays.items():
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            shape = f"{array.dtype}{list(array.shape)}"
            raise ConfigError("data", f"{path}: {name} is {shape}", "one dimension of integers")
    groups = arrays["group"]
    for name, flat, count in (
        ("offsets", "token_ids", len(groups)),
        ("prompt_offsets", "prompt_ids", int(groups.max(initial=-1)) + 1),
    ):
        offsets = arrays[name]
        ascends = np.all(np.diff(offsets) >= 0) and np.all(offsets[:1] >= 0)
        if len(offsets) <= count or not ascends or offsets[-1] > len(arrays[flat]):
            raise ConfigError("data", f"{path}: {name} does not cut {flat}", f"{count} + 1 ascending offsets")
    if not len(groups) or groups.min() < 0 or not len(arrays["token_ids"]):
        raise ConfigError("data", f"{path}: no responses, or a group below 0", "`group` holds indices of prompts")

    def cut(name: str, offsets: str, index: int) -> np.ndarray:
        return arrays[name][arrays[offsets][index] : arrays[offsets][index + 1]].astype(np.int32)

    return [
        RecordedGroup(
            prompt=cut("prompt_ids", "prompt_offsets", g),
            responses=[cut("token_ids", "offsets", i) for i in np.flatnonzero(groups == g).tolist()],
        )
        for g in np.unique(groups).tolist()
    ]


def measure_acceptance(
    groups: Sequence[RecordedGroup], references: Sequence[int], draft_length: int, every: int
) -> dict[str, Any]:
    """Replay lines with each number of references, and trees with the largest.

    The best-first tree gets the largest budget that drafts no more nodes per step than the fixed beam of 4.
    """
    line, most = SpeculationArgs(max_spec_tokens=draft_length), max(references)

    def replay(num_references: int, budget: int, args: SpeculationArgs, fixed_beam: bool = False) -> Acceptance:
        total = Acceptance()
        for group in groups:
            responses = group.responses
            for i in range(0, len(responses), every):
                siblings = [responses[(i + 1 + j) % len(responses)] for j in range(num_references)]
                counts = replay_with_references(
                    group.prompt, siblings, responses[i], budget, args, fixed_beam=fixed_beam
                )
                total.add(len(responses[i]), counts)
        return total

    lines = {str(n): replay(n, draft_length, line) for n in references}
    beams = {
        f"k{width}": replay(most, width * draft_length, replace(line, top_k=width), fixed_beam=True) for width in (2, 4)
    }
    low, high = 1, 8 * draft_length  # The budget that fits is in [low, high).
    best = replay(most, low, TREE)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = replay(most, middle, TREE)
        if candidate.drafted_per_step <= beams["k4"].drafted_per_step:
            low, best = middle, candidate
        else:
            high = middle
    trees = beams | {"best_first": best}

    lockstep = {}
    for n in references:
        total = Acceptance()
        for group in groups:
            for first in range(0, len(group.responses) - n, (n + 1) * every):
                together = group.responses[first : first + n + 1]
                counts = replay_in_lockstep(group.prompt, together, draft_length, line)
                total.add(sum(map(len, together)), counts)
        lockstep[str(n)] = total.mean_length
    return {
        "acceptance": {"linear": {n: a.mean_length for n, a in lines.items()}}
        | {name: a.mean_length for name, a in trees.items()},
        "lockstep": lockstep,
        "drafted_per_step": {"linear": {n: a.drafted_per_step for n, a in lines.items()}}
        | {name: a.drafted_per_step for name, a in trees.items()},
        "best_first_budget": low,
    }


def measure_speed(groups: Sequence[RecordedGroup], draft_length: int) -> dict[str, float]:
    """Time lines for 64 and 256 requests in groups of 16 that are somewhere in their responses, all in one call."""
    result: dict[str, float] = {}
    args = SpeculationArgs(max_spec_tokens=draft_length)
    for num_requests in (64, 256):
        automata, places, append_rate = _build(groups, num_requests)
        out = DraftBatch.empty(num_requests, draft_length)
        budgets = np.full(num_requests, draft_length, np.int32)
        times_ms = []
        for _ in range(NUM_TIMED_CALLS + 10):
            started = time.perf_counter()
            batch_speculate(places, budgets, args, out)
            times_ms.append((time.perf_counter() - started) * 1e3)
        for percentile in (50, 99):
            key = f"latency_{num_requests}_p{percentile}_ms"
            result[key] = float(np.percentile(times_ms[10:], percentile))
    result["append_tokens_per_s"] = append_rate
    num_tokens = sum(automaton.num_tokens for automaton in automata)
    result["bytes_per_token"] = sum(automaton.num_bytes for automaton in automata) / num_tokens
    return result


def _build(groups: Sequence[RecordedGroup], num_requests: int) -> tuple[list[SuffixAutomaton], np.ndarray, float]:
    """Automata of groups in which every request is at a random place, grown delta by delta; and tokens per second."""
    rng = np.random.default_rng(0)
    automata, places, seconds, num_tokens = [], [], 0.0, 0
    for index in range(num_requests // REQUESTS_PER_GROUP):
        group = groups[index % len(groups)]
        chosen = rng.permutation(len(group.responses))
        texts = [group.responses[chosen[i % len(chosen)]] for i in range(REQUESTS_PER_GROUP)]
        texts = [text[: max(1, int(len(text) * rng.uniform(0.2, 1.0)))] for text in texts]
        automaton = SuffixAutomaton()
        automaton.open(0)
        automaton.append(0, group.prompt)
        for request in range(1, REQUESTS_PER_GROUP + 1):
            automaton.open(request, like=0)
        started = time.perf_counter()
        for first in range(0, max(map(len, texts)), DELTA_TOKENS):
            for request, text in enumerate(texts, start=1):
                automaton.append(request, text[first : first + DELTA_TOKENS])
        seconds += time.perf_counter() - started
        num_tokens += sum(map(len, texts))
        automata.append(automaton)
        places += [address_of(automaton, request) for request in range(1, REQUESTS_PER_GROUP + 1)]
    return automata, np.array(places, np.int64), num_tokens / seconds


def _flatten(values: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        flat |= {f"{key} {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _parse_references(text: str) -> list[int]:
    try:
        references = [int(part) for part in text.split(",")]
    except ValueError:
        references = [-1]
    if min(references) < 0:
        raise ConfigError("references", f"{text!r}", "counts of 0 or more with commas between, such as 0,1,5,15")
    return references
