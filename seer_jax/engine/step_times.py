"""Measures how long the step programs of an engine take: the T(B, gamma) of Seer's Algorithm 1."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from seer_jax.core.errors import ConfigError
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.core.packing import Run
from seer_jax.core.rank_packing import pack_ranks, unpack_ranks
from seer_jax.core.sequence import Sequence
from seer_jax.core.step_shapes import StepBuckets, StepShape
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams

STEPS_PER_DISPATCH = 8
"""Steps of a timed dispatch of plain decoding, about what it gets between two requests that finish."""
SHORT_CONTEXT = 32


@dataclass(frozen=True, kw_only=True)
class StepPrograms:
    """The warmed-up programs of an idle engine.

    Attributes:
        launch: Runs one of a shape on packed inputs; returns its output. All pages of the cache may be written.
        buckets: The shapes.
        truncates: Which of them, see `Engine.warmup`.
        max_model_len: Longest context.
        page_size: Tokens per page.
        max_steps: Steps in one dispatch at most.
        facts: What else step times depend on: the model's shape, its type, kernels, type of the cache, devices.
    """

    launch: Callable[[StepShape, np.ndarray], np.ndarray]
    buckets: StepBuckets
    truncates: bool
    max_model_len: int
    page_size: int
    max_steps: int
    facts: tuple[object, ...]

    @property
    def fingerprint(self) -> str:
        """Names everything that step times depend on beside the device."""
        facts = (*self.facts, self.max_model_len, self.max_steps, self.buckets.all_shapes(self.truncates))
        return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def get_step_times(programs: StepPrograms, file: str | None) -> MeasuredStepTimes:
    """Read an engine's step times from a file, or measure them if it is None.

    Raises:
        ConfigError: If the file cannot be read, or is of another model, device or configuration.
    """
    if file is None:
        return measure_step_times(programs)
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError("speculation.profile", f"no file {file!r}", "write one with seer-jax profile")
    times = MeasuredStepTimes.from_json(path.read_text(encoding="utf-8"))
    for name, value in (("device", _device()), ("model", programs.fingerprint)):
        if getattr(times, name) != value:
            problem = (
                f"{file}: {name} is {getattr(times, name)!r}, not {value!r}: of another model, mode or engine setting"
            )
            raise ConfigError("speculation.profile", problem, "measure again with seer-jax profile")
    return times


def measure_step_times(programs: StepPrograms, *, repeats: int = 7) -> MeasuredStepTimes:
    """Time every program that decodes or verifies, at a short and at the longest context.

    They read and write any pages. All ranks are as full, so sizes are those of one rank times their number.

    Args:
        programs: The programs.
        repeats: Runs of each, of which the fastest counts.
    """
    decode = programs.buckets.decode_shapes(programs.truncates)
    verify = programs.buckets.verify_shapes(programs.truncates) or decode
    num_ranks = programs.buckets.num_ranks
    steps = min(STEPS_PER_DISPATCH, programs.max_steps)
    longest = max(2, programs.max_model_len - max(programs.max_steps, verify[-1].max_depth))
    contexts = (min(SHORT_CONTEXT, longest // 2), longest)

    def seconds(shape: StepShape, num_steps: int) -> tuple[float, float]:
        first, second = (_time_program(programs, shape, c, num_steps, repeats) / num_steps for c in contexts)
        return first, second

    return MeasuredStepTimes(
        device=_device(),
        model=programs.fingerprint,
        jax=jax.__version__,
        contexts=contexts,
        plain_sizes=tuple(shape.num_requests * num_ranks for shape in decode),
        plain_s=tuple(seconds(shape, steps) for shape in decode),
        verify_sizes=tuple(shape.num_tokens * num_ranks for shape in verify),
        verify_s=tuple(seconds(shape, 1) for shape in verify),
    )


def _time_program(programs: StepPrograms, shape: StepShape, context: int, num_steps: int, repeats: int) -> float:
    """Fastest run of a full program, packing and unpacking included."""
    num_runs = min(shape.num_requests, shape.num_tokens // (shape.tile if shape.num_tiles else 1))
    capacity = shape.num_tiles * shape.tile or shape.num_rows
    lengths = [capacity // num_runs + (i < capacity % num_runs) for i in range(num_runs)]
    runs = [
        _fake_run(programs, i, context, min(length, 1 + shape.max_depth), rank)
        for rank in range(programs.buckets.num_ranks)
        for i, length in enumerate(lengths)
    ]
    rows, tiles = ([], runs) if shape.num_tiles else (runs, [])

    def run() -> None:
        outputs = programs.launch(shape, pack_ranks(rows, tiles, shape, num_steps, programs.buckets))
        unpack_ranks(outputs, rows, tiles, shape, programs.buckets)

    run()
    return min(_seconds(run) for _ in range(repeats))


def _fake_run(programs: StepPrograms, index: int, context: int, length: int, rank: int) -> Run:
    """A newest token at the end of a context with a line of drafts after it."""
    chunk = RequestChunk(
        request_id=RequestId(0, index),
        chunk_index=0,
        token_ids=np.zeros(context, np.int32),
        num_prompt_tokens=context,
        max_chunk_tokens=1 << 20,
        max_total_tokens=context + (1 << 20),
        num_reserved_pages=0,
        policy_version=0,
        priority=0,
        sampling=SamplingParams(max_tokens=1 << 20),
        sampling_key=index,
    )
    sequence, buckets = Sequence(chunk, index, rank=rank), programs.buckets
    # Pages of its own while there are enough, so that contexts are as far from each other as they would be.
    first, garbage_page = index * buckets.max_pages, rank * buckets.rank_pages
    sequence.pages = [garbage_page + 1 + (first + i) % (buckets.rank_pages - 1) for i in range(buckets.max_pages)]
    return Run(
        sequence=sequence,
        start=context - 1,
        token_ids=np.zeros(length, np.int32),
        samples=True,
        parents=np.arange(-1, length - 2, dtype=np.int32),
    )


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _device() -> str:
    kind = jax.devices()[0].device_kind
    return f"{kind}, {len(os.sched_getaffinity(0))} cores" if kind == "cpu" else kind
