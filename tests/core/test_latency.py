"""Measured step times: padding, contexts, noise, and the file that keeps them."""

import json
import math

import numpy as np
import pytest

from seer_jax.core.errors import ConfigError
from seer_jax.core.latency import FIELDS, MeasuredStepTimes

TIMES = MeasuredStepTimes(
    device="TFRT_CPU_0",
    model="tiny_math float32",
    jax="0.10.2",
    contexts=(100, 300),
    plain_sizes=(2, 8),
    plain_s=((1.0, 2.0), (3.0, 5.0)),
    verify_sizes=(16, 64, 128),
    verify_s=((4.0, 6.0), (3.0, 9.0), (10.0, 8.0)),
)


@pytest.mark.parametrize(
    ("num_seqs", "context", "seconds"),
    [
        (1, 100, 1.0),
        (2, 300, 2.0),
        (3, 100, 3.0),  # runs in the program of 8
        (2, 200, 1.5),
        (2, 500, 3.0),  # beyond what was measured
        (2, 0, 1.0),  # never below the shorter
        (9, 100, math.inf),
    ],
)
def test_a_step_takes_the_time_of_its_program_at_its_context(num_seqs: int, context: float, seconds: float) -> None:
    assert TIMES.plain_step_s(num_seqs, float(context)) == pytest.approx(seconds)


def test_many_sizes_at_once() -> None:
    num_tokens = np.array([1, 16, 17, 64, 65, 128, 129])
    seconds = TIMES.verify_step_s(4, num_tokens, 300.0)
    assert isinstance(seconds, np.ndarray) and seconds.dtype == np.float64
    assert seconds.tolist() == [6.0, 6.0, 9.0, 9.0, 10.0, 10.0, math.inf]
    assert [TIMES.verify_step_s(4, int(n), 300.0) for n in num_tokens] == seconds.tolist()


@pytest.mark.parametrize("context", [0.0, 100.0, 150.0, 300.0, 10_000.0])
def test_a_larger_program_or_a_longer_context_is_never_cheaper(context: float) -> None:
    """Though the program of 64 was measured faster than that of 16, and that of 128 faster at the longer context."""
    seconds = TIMES.verify_step_s(1, np.arange(1, 129), context)
    assert isinstance(seconds, np.ndarray)
    assert np.all(np.diff(seconds) >= 0)
    assert np.all(TIMES.verify_step_s(1, np.arange(1, 129), context + 50) >= seconds)


def test_json_round_trip() -> None:
    assert MeasuredStepTimes.from_json(TIMES.to_json()) == TIMES
    assert json.loads(TIMES.to_json())["device"] == "TFRT_CPU_0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": None}, "device is None"),
        ({"contexts": [100]}, "contexts holds"),
        ({"contexts": [100, 100]}, r"contexts is \[100, 100\]"),
        ({"plain_sizes": [8, 2]}, r"plain_sizes is \[8, 2\]"),
        ({"plain_sizes": [True, 2]}, "plain_sizes holds"),
        ({"plain_sizes": []}, r"plain_sizes is \[\]"),
        ({"plain_sizes": "28"}, "plain_sizes holds '28'"),
        ({"verify_sizes": [0, 1, 2]}, r"verify_sizes is \[0, 1, 2\]"),
        ({"verify_sizes": [1.5, 2, 3]}, "verify_sizes holds"),
        ({"plain_s": [[1.0, 2.0]]}, "plain_s holds 1 programs"),
        ({"plain_s": [1.0, 2.0]}, r"plain_s holds 1.0"),
        ({"plain_s": 3}, "plain_s holds 3"),
        ({"verify_s": [[1, 2], [3, 4], [5]]}, r"verify_s holds \[5\]"),
        ({"verify_s": [[1, 2], [3, 0], [5, 6]]}, "verify_s is"),
        ({"verify_s": [[1, 2], [3, 4], [5, float("nan")]]}, "verify_s is"),
        ({"verify_s": [[1, 2], [3, 4], [5, float("inf")]]}, "verify_s is"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_wrong(changes: dict, message: str) -> None:
    text = json.dumps(json.loads(TIMES.to_json()) | changes)
    with pytest.raises(ConfigError, match=rf"^speculation\.profile: .*{message}"):
        MeasuredStepTimes.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", json.dumps({name: 1 for name in FIELDS[1:]})])
def test_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^speculation\.profile"):
        MeasuredStepTimes.from_json(text)
