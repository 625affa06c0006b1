"""Traces that Perfetto reads: processes, rows without overlap, counters; and recorded from a rollout's events."""

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.commands import StartChunk
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import ChunkFinished, InstanceLost, InstanceReport
from seer_jax.core.types import InstanceStatus, RequestChunk, RequestId, SamplingParams
from seer_jax.obs.trace import Counter, RolloutRecorder, Span, check_trace_path, write_trace

TOKENS = np.array([1, 2], np.int32)


def span(process: str, start_s: float, end_s: float, **args: int) -> Span:
    return Span(process=process, name=f"{start_s}", start_s=start_s, end_s=end_s, args=args)


def write(path: Path, spans: list[Span], counters: tuple[Counter, ...] = ()) -> list[dict]:
    write_trace(path, spans, counters)
    data = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text())
    assert data.keys() == {"traceEvents", "displayTimeUnit"} and data["displayTimeUnit"] == "ms"
    return data["traceEvents"]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_instances_are_processes_in_natural_order_and_times_are_microseconds(tmp_path: Path, name: str):
    events = write(tmp_path / name, [span("instance 10", 0.5, 2.0, tokens=3), span("instance 9", 0.0, 1.0)])
    processes = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert list(processes) == ["instance 9", "instance 10"]
    complete = [e for e in events if e["ph"] == "X"]
    assert complete[1] == {
        "ph": "X", "pid": processes["instance 10"], "tid": 1, "name": "0.5", "ts": 500_000, "dur": 1_500_000,
        "args": {"tokens": 3},
    }  # fmt: skip
    assert "args" not in complete[0]


def test_a_row_is_used_again_as_soon_as_it_is_free(tmp_path: Path):
    times = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (3.5, 5.0)]
    events = write(tmp_path / "t.json", [span("i", *pair) for pair in times])
    assert [e["tid"] for e in events if e["ph"] == "X"] == [1, 2, 1, 2]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["slot 0", "slot 1"]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_spans_of_one_row_never_overlap_and_rows_are_as_few_as_can_be(times):
    with TemporaryDirectory() as directory:
        spans = [span("i", start / 10, (start + length) / 10) for start, length in times]
        events = write(Path(directory) / "trace.json", spans)
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, rows.values())) == len(times)
    for row in rows.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(row))
    most = max((sum(s <= at < s + length for s, length in times) for at in range(71)), default=0)
    assert len(rows) == most


def test_a_counter_is_written_where_it_changes(tmp_path: Path):
    counter = Counter(process="i", name="running", times_s=np.arange(4.0), values=np.array([2, 2, 3, 0]))
    events = [e for e in write(tmp_path / "t.json", [], (counter,)) if e["ph"] == "C"]
    assert [(e["ts"], e["args"]["value"]) for e in events] == [(0, 2), (2_000_000, 3), (3_000_000, 0)]


def test_a_span_that_ends_before_it_starts_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"instance 3: 2.0 ends at 1.0 s"):
        write_trace(tmp_path / "t.json", [span("instance 3", 2.0, 1.0)])


@pytest.mark.parametrize(("name", "message"), [("trace.txt", "no trace's name"), ("no/trace.json", "cannot be")])
def test_a_file_that_cannot_be_a_trace_is_an_error_of_the_option(tmp_path: Path, name: str, message: str):
    check_trace_path(tmp_path / "trace.json.gz")
    with pytest.raises(ConfigError, match=rf"^trace: .*{message}"):
        check_trace_path(tmp_path / name)


def start(instance_id: int, index: int) -> StartChunk:
    chunk = RequestChunk(
        request_id=RequestId(7, index),
        chunk_index=0,
        token_ids=TOKENS,
        num_prompt_tokens=2,
        max_chunk_tokens=8,
        max_total_tokens=10,
        num_reserved_pages=0,
        policy_version=0,
        priority=0,
        sampling=SamplingParams(max_tokens=8),
        sampling_key=0,
    )
    return StartChunk(instance_id=instance_id, chunk=chunk)


def test_a_rollout_is_recorded_from_its_events():
    recorder = RolloutRecorder("seer ")
    status = InstanceStatus(instance_id=1, num_running=2, num_waiting=0, num_free_pages=3, num_total_pages=4)
    recorder.on_event(0.0, InstanceReport(status=status), [start(0, 0), start(1, 1), start(1, 2)])
    finished = ChunkFinished(
        instance_id=1,
        request_id=RequestId(7, 1),
        chunk_index=0,
        token_ids=TOKENS,
        logprobs=np.zeros(2, np.float32),
        finish_reason="stop",
        policy_version=0,
    )
    recorder.on_event(1.5, finished, [])
    recorder.on_event(2.0, InstanceLost(instance_id=0), [start(1, 0)])
    recorder.on_event(2.5, finished, [])  # Late answer to what has ended already.
    assert recorder.spans == [
        Span(process="seer instance 1", name="g7/1#0", start_s=0.0, end_s=1.5,
             args={"tokens": 2, "finish_reason": "stop"}),
        Span(process="seer instance 0", name="g7/0#0", start_s=0.0, end_s=2.0,
             args={"finish_reason": "instance lost"}),
    ]  # fmt: skip
    running, utilization = recorder.counters()
    assert (running.process, running.values.tolist(), utilization.values.tolist()) == ("seer instance 1", [2.0], [0.25])
