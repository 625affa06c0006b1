"""Metrics: valid JSON lines at any moment."""

import json

import numpy as np
import pytest

from seer_jax.obs.metrics import MetricsWriter, to_json_line


def test_a_line_can_be_read_before_the_file_is_closed_and_reopening_keeps_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write({"iteration": 0, "loss": np.float32(0.5)})
        assert json.loads(path.read_text()) == {"iteration": 0, "loss": 0.5}
    with MetricsWriter(path) as metrics:
        metrics.write({"iteration": np.int64(1)})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"iteration": 0, "loss": 0.5},
        {"iteration": 1},
    ]


def test_numbers_of_numpy_and_nested_values_become_plain_json():
    record = {"a": np.arange(3), "b": (np.bool_(True), None), "c": {1: np.float64(2)}, "d": "ä\nb"}
    line = to_json_line(record)
    assert "\n" not in line
    assert json.loads(line) == {"a": [0, 1, 2], "b": [True, None], "c": {"1": 2.0}, "d": "ä\nb"}


def test_numbers_that_json_lacks_become_null():
    line = to_json_line({"a": float("nan"), "b": np.float32("inf"), "c": [-np.inf]})
    assert json.loads(line) == {"a": None, "b": None, "c": [None]}


def test_an_object_that_is_no_number_is_refused():
    with pytest.raises(TypeError):
        to_json_line({"a": object()})
