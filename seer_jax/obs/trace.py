"""Traces for https://ui.perfetto.dev: who did what when, in Chrome's JSON trace format."""

import gzip
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from seer_jax.core.commands import Command, StartChunk
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import ChunkFinished, Event, InstanceLost, InstanceReport
from seer_jax.core.types import RequestId

SUFFIXES = (".json", ".json.gz")
RUNNING, KV_UTILIZATION = "running requests", "KV utilization"
"""Counters of an instance."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that took time.

    Attributes:
        process: Where it happened, such as "instance 3"; a heading in the trace.
        name: What it was, such as "g12/3#1".
        start_s: When it began.
        end_s: When it ended, not before `start_s`.
        args: Plain JSON values that a click on it shows.
    """

    process: str
    name: str
    start_s: float
    end_s: float
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counter:
    """A number over time; each value holds until the next.

    Attributes:
        process: As for `Span`.
        name: What is counted.
        times_s: Ascending.
        values: One for each time, finite.
    """

    process: str
    name: str
    times_s: Num[np.ndarray, " samples"]
    values: Num[np.ndarray, " samples"]


class RolloutRecorder:
    """Collects the trace of a rollout from what its runner reports; pass `on_event` to `RolloutRunner`."""

    def __init__(self, prefix: str = "") -> None:
        """Start empty.

        Args:
            prefix: Put before "instance 0" and so on, to tell rollouts in one trace apart.
        """
        self._prefix = prefix
        self._started: dict[tuple[int, RequestId, int], float] = {}
        self._reports: dict[int, list[tuple[float, int, float]]] = {}
        self.spans: list[Span] = []
        """Chunks that have ended, from sending to the instance to the answer; waiting there included."""

    def on_event(self, elapsed_s: float, event: Event, commands: Sequence[Command]) -> None:
        """Take in an event and the driver's commands.

        Args:
            elapsed_s: Seconds since the rollout started.
            event: What happened.
            commands: What follows from it.
        """
        match event:
            case ChunkFinished():
                key = (event.instance_id, event.request_id, event.chunk_index)
                args = {"tokens": len(event.token_ids), "finish_reason": event.finish_reason}
                self._end(key, elapsed_s, args)
            case InstanceLost():
                for key in [key for key in self._started if key[0] == event.instance_id]:
                    self._end(key, elapsed_s, {"finish_reason": "instance lost"})
            case InstanceReport(status=status):
                utilization = 1 - status.num_free_pages / max(1, status.num_total_pages)
                sample = (elapsed_s, status.num_running, utilization)
                self._reports.setdefault(status.instance_id, []).append(sample)
        for command in commands:
            if isinstance(command, StartChunk):
                chunk = command.chunk
                self._started[command.instance_id, chunk.request_id, chunk.chunk_index] = elapsed_s

    def counters(self) -> list[Counter]:
        """Requests in steps and share of KV pages in use, as the instances reported them."""
        counters = []
        for instance_id, samples in sorted(self._reports.items()):
            times_s, running, utilization = np.array(samples, np.float64).T
            process = f"{self._prefix}instance {instance_id}"
            counters += [
                Counter(process=process, name=RUNNING, times_s=times_s, values=running),
                Counter(process=process, name=KV_UTILIZATION, times_s=times_s, values=utilization),
            ]
        return counters

    def _end(self, key: tuple[int, RequestId, int], end_s: float, args: dict[str, Any]) -> None:
        start_s = self._started.pop(key, None)
        if start_s is not None:
            instance_id, request_id, index = key
            name = f"g{request_id.group_id}/{request_id.index}#{index}"
            process = f"{self._prefix}instance {instance_id}"
            self.spans.append(Span(process=process, name=name, start_s=start_s, end_s=end_s, args=args))


def check_trace_path(path: Path, *, option: str = "trace") -> None:
    """Check early that a trace can be written.

    Args:
        path: File that the user named.
        option: Name of the option, for the error.

    Raises:
        ConfigError: If its directory is missing, it is a directory, or its name does not say JSON.
    """
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(option, f"{str(path)!r} is no trace's name", f"end it in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(option, f"{str(path)!r} cannot be written", "a file in a directory that exists")


def write_trace(path: Path, spans: Iterable[Span], counters: Iterable[Counter] = ()) -> None:
    """Write a trace. Spans that overlap get rows of their own in their process.

    Args:
        path: File to write, compressed if it ends in `.gz`; one that exists is replaced.
        spans: In any order; processes are shown in natural order of their names ("instance 10" after "instance 9").
        counters: Tracks below the spans of their process.

    Raises:
        ValueError: If a span ends before it starts, or a counter is not finite.
    """
    by_process: dict[str, list[Span]] = {}
    for span in spans:
        by_process.setdefault(span.process, []).append(span)
    counters = list(counters)
    names = sorted({*by_process, *(counter.process for counter in counters)}, key=_natural_key)
    process_ids = {name: index + 1 for index, name in enumerate(names)}
    events: list[dict[str, Any]] = []
    for process, process_id in process_ids.items():
        events += _process_events(process, process_id, by_process.get(process, []))
    for counter in counters:
        events += _counter_events(counter, process_ids[counter.process])
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False, separators=(",", ":"))
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def _process_events(process: str, process_id: int, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Headings and spans of a process, the lowest free row for each span in order of their starts."""
    heading = {"ph": "M", "pid": process_id, "tid": 0}
    events: list[dict[str, Any]] = [
        heading | {"name": "process_name", "args": {"name": process}},
        heading | {"name": "process_sort_index", "args": {"sort_index": process_id}},
    ]
    busy: list[tuple[int, int]] = []  # (end, row)
    free: list[int] = []
    num_rows = 0
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s, span.name)):
        start_us, end_us = _to_us(span.start_s), _to_us(span.end_s)
        if end_us < start_us:
            raise ValueError(f"{process}: {span.name} ends at {span.end_s} s, before its start at {span.start_s} s")
        while busy and busy[0][0] <= start_us:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            row = heapq.heappop(free)
        else:
            row, num_rows = num_rows, num_rows + 1
            label = {"name": "thread_name", "args": {"name": f"slot {row}"}}
            events.append({"ph": "M", "pid": process_id, "tid": row + 1} | label)
        heapq.heappush(busy, (end_us, row))
        event = {"ph": "X", "pid": process_id, "tid": row + 1, "name": span.name, "ts": start_us}
        events.append(event | {"dur": end_us - start_us} | ({"args": dict(span.args)} if span.args else {}))
    return events


def _counter_events(counter: Counter, process_id: int) -> list[dict[str, Any]]:
    """A counter's changes."""
    events, last = [], None
    for time_s, value in zip(counter.times_s.tolist(), counter.values.tolist(), strict=True):
        if value != last:
            event = {"ph": "C", "pid": process_id, "name": counter.name, "ts": _to_us(time_s)}
            events.append(event | {"args": {"value": value}})
            last = value
    return events


def _to_us(seconds: float) -> int:
    return round(seconds * 1e6)


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts "instance 10" after "instance 9": the words of a name, numbers by value."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in name.split()]
