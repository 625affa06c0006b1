"""A rollout whose process is killed goes on from its event log; faults are asked for on the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seer_jax.cli.main import main

SMALL = (
    "--runtime", "local", "--instances", "2", "--json", "--engine.deterministic",
    "--rollout.num-groups", "3", "--rollout.group-size", "4", "--rollout.chunk-size", "8",
    "--sampling.max-tokens", "40", "--engine.max-model-len", "208", "--engine.max-num-seqs", "4",
    "--engine.max-prefill-tokens", "32", "--engine.num-pages", "40", "--data.heldout-prompts", "4",
)  # fmt: skip
COMMAND = "import sys; from seer_jax.cli.main import main; sys.exit(main())"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    """Run a verb; the object on the last line of stdout."""
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb that must refuse; its message."""
    assert main(argv) == 2
    return capsys.readouterr().err


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def roll_out_and_die(run_dir: Path, num_events: int) -> int:
    """Start a rollout and kill its process with SIGKILL after so many events; returns how many are logged."""
    log = run_dir / "0-seer" / "events.jsonl"
    argv = [sys.executable, "-c", COMMAND, "rollout", "--run-dir", str(run_dir), *SMALL]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and count_lines(log) < num_events:
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it had ended before"
    return count_lines(log)


def check_resumed(capsys: pytest.CaptureFixture[str], run_dir: Path, expected: dict, num_events: int) -> None:
    """It goes on, and says the same; then it is finished."""
    with (run_dir / "0-seer" / "events.jsonl").open("a") as log:
        log.write('{"type": "ChunkFin')  # Torn, as a full disk would leave it.
    resumed = run(capsys, "rollout", "--resume", str(run_dir), "--json")
    assert resumed["output_sha256"] == expected["output_sha256"]
    assert resumed["replayed_events"] == num_events
    samples = (run_dir / "0-seer" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == resumed["num_requests"] == expected["num_requests"] == 12
    assert "is finished" in fail(capsys, "rollout", "--resume", str(run_dir), "--json")


def test_a_killed_rollout_is_resumed_with_the_same_tokens(capsys, tmp_path) -> None:
    expected = run(capsys, "rollout", "--run-dir", str(tmp_path / "whole"), *SMALL)
    run_dir = tmp_path / "killed"
    num_events = roll_out_and_die(run_dir, 15)
    assert "rollout.policy: was 'seer'" in fail(capsys, "rollout", "--resume", str(run_dir), "--policy", "divided")
    assert "compare" in fail(capsys, "rollout", "--resume", str(run_dir), "--compare", "seer")
    assert "sampling.max_tokens: was 40" in fail(
        capsys, "rollout", "--resume", str(run_dir), "--sampling.max-tokens", "9"
    )
    check_resumed(capsys, run_dir, expected, num_events)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments(capsys, tmp_path) -> None:
    whole = tmp_path / "whole"
    expected = run(capsys, "rollout", "--run-dir", str(whole), *SMALL)
    last = count_lines(whole / "0-seer" / "events.jsonl")
    for seed in range(20):
        run_dir = tmp_path / str(seed)
        num_events = roll_out_and_die(run_dir, random.Random(seed).randint(1, last - 4))
        check_resumed(capsys, run_dir, expected, num_events)


def test_comparisons_are_not_resumed(capsys, tmp_path) -> None:
    run_dir = tmp_path / "run"
    run(capsys, "rollout", "--compare", "seer,divided", "--run-dir", str(run_dir), *SMALL)
    assert "several rollouts" in fail(capsys, "rollout", "--resume", str(run_dir))


def test_chaos_in_its_short_form_kills_and_changes_no_token(capsys, tmp_path) -> None:
    expected = run(capsys, "rollout", "--run-dir", str(tmp_path / "calm"), *SMALL)
    chaos = ("--chaos", "kill_instance=2,slow_instance=2x", "--chaos.seed", "4")
    result = run(capsys, "rollout", "--run-dir", str(tmp_path / "chaos"), *chaos, *SMALL)
    assert result["output_sha256"] == expected["output_sha256"]
    assert result["instances_lost"] == 2 and result["chunks_resumed"] > 0 and result["re_prefilled_tokens"] > 0


@pytest.mark.parametrize(
    ("chaos", "message"),
    [
        ("kill_instances=2", "no fault 'kill_instances' (did you mean kill_instance?)"),
        ("kill_instance=many", "chaos.kill_instance"),
        ("", "no fault ''"),
        ("drop_message=0.5", "chaos.drop_message"),
    ],
)
def test_faults_that_do_not_exist_are_refused(capsys, chaos: str, message: str) -> None:
    assert message in fail(capsys, "rollout", "--chaos", chaos, *SMALL)
