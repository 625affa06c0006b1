"""`seer-jax bench draft` on generated groups; its figures agree with what the groups are made of."""

import json
from pathlib import Path

import numpy as np
import pytest

from seer_jax.cli.main import main


def write(path: Path, **changes: object) -> str:
    """Three groups of four responses: each is its group's own random text, so siblings are equal."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 1000, 120) for _ in range(3)]
    arrays = {
        "token_ids": np.concatenate([text for text in texts for _ in range(4)]),
        "offsets": np.arange(13) * 120,
        "group": np.repeat(np.arange(3), 4),
        "prompt_ids": np.arange(30),
        "prompt_offsets": np.array([0, 10, 20, 30]),
    }
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return str(path)


def test_equal_siblings_are_accepted_whole_and_random_text_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.npz")
    assert main(["bench", "draft", "--data", data, "--references", "0,2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The first token follows the prompt in every sibling: 14 steps of 8 accepted and 1 more cover 120 tokens.
    assert result["acceptance"]["linear"]["2"] == pytest.approx(120 / 14)
    assert result["acceptance"]["linear"]["0"] < 1.1
    assert result["lockstep"]["0"] == result["acceptance"]["linear"]["0"]
    # In lock-step the siblings are one step ahead at most.
    assert 1.5 < result["lockstep"]["2"] < result["acceptance"]["linear"]["2"]
    assert set(result["acceptance"]) == set(result["drafted_per_step"]) == {"linear", "k2", "k4", "best_first"}
    assert result["drafted_per_step"]["best_first"] <= result["drafted_per_step"]["k4"]
    for name in ("latency_64_p50_ms", "latency_64_p99_ms", "latency_256_p50_ms", "latency_256_p99_ms"):
        assert result[name] > 0
    # Equal texts share their states.
    assert result["append_tokens_per_s"] > 0 and 0 < result["bytes_per_token"] < 50


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"group": None}, [], "data:"),
        ({"offsets": np.arange(12) * 120}, [], "offsets does not cut token_ids"),
        ({"offsets": -np.arange(13)}, [], "offsets does not cut token_ids"),
        ({"prompt_offsets": np.array([0, 10])}, [], "prompt_offsets does not cut prompt_ids"),
        ({"token_ids": np.zeros(1440)}, [], "token_ids is float64[1440]"),
        ({"group": np.zeros(0, int)}, [], "no responses"),
        ({}, ["--references", "0,4"], "references: 4, but a group has 4 responses"),
        ({}, ["--references", "many"], "references: 'many'"),
        ({}, ["--every", "0"], "every: is 0"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, options: list[str], message: str
) -> None:
    data = write(tmp_path / "data.npz", **changes)
    assert main(["bench", "draft", "--data", data, "--references", "0", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "broken.npz").write_bytes(content)
    assert main(["bench", "draft", "--data", str(tmp_path / "broken.npz")]) == 2
    assert capsys.readouterr().err.startswith("seer-jax: error: data:")


@pytest.mark.parametrize(("arguments", "message"), [([], "no benchmark"), (["draft", "--data", "nowhere"], "no file")])
def test_missing_benchmark_or_file(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_figures_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.npz")
    assert main(["bench", "draft", "--data", data, "--references", "1", "--every", "2"]) == 0
    assert "acceptance linear 1" in capsys.readouterr().out
