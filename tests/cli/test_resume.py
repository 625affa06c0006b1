"""A rollout or training whose process is killed goes on by its event log; faults are asked for on the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from seer_jax.cli.main import main
from seer_jax.obs.event_file import EventFile

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
    kill_when(lambda: count_lines(log) >= num_events, "rollout", "--run-dir", str(run_dir), *SMALL)
    return count_lines(log)


def kill_when(is_due: Callable[[], bool], *argv: str) -> None:
    """Run a verb in a process of its own, and kill it with SIGKILL when it is due."""
    argv = (sys.executable, "-c", COMMAND, *argv)
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not is_due():
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it had ended before"


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


TRAIN = (
    *SMALL, "--rollout.num-groups", "8", "--sampling.max-tokens", "50",
    "--train.iterations", "3", "--train.checkpoint-every", "1", "--engine.expert-ids", "--train.replay-routing",
)  # fmt: skip


def read_curve(run_dir: Path) -> list[tuple]:
    """Reward, tokens and what the update made of their log-probabilities, of every iteration."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("iteration", "reward_mean", "output_sha256", "loss", "grad_norm", "logprob_gap_max")
    return [tuple(record[name] for name in names) for record in records if record["kind"] == "iteration"]


def kill_and_resume_training(capsys: pytest.CaptureFixture[str], run_dir: Path, whole: Path, num_events: int) -> None:
    """Kill a training run so many events into its second rollout; it goes on there, and ends as if undisturbed."""
    log, second = run_dir / "events.jsonl", b'{"type": "IterationBegun", "iteration": 1, '

    def is_due() -> bool:
        return log.exists() and (lines := log.read_bytes()).startswith(second) and lines.count(b"\n") > num_events

    kill_when(is_due, "train", "--run-dir", str(run_dir), *TRAIN)
    whole_lines = log.read_bytes()
    assert whole_lines.startswith(second)
    logged = whole_lines.count(b"\n") - 1
    with log.open("a") as file:
        file.write('{"type": "ChunkFin')
    assert main(["train", "--resume", str(run_dir), "--json"]) == 0
    said = capsys.readouterr().err
    assert f"iteration 2 goes on inside its rollout, {logged} events in" in said
    assert read_curve(run_dir) == read_curve(whole)


def test_killed_training_goes_on_inside_its_rollout(capsys, tmp_path) -> None:
    whole = tmp_path / "whole"
    assert run(capsys, "train", "--run-dir", str(whole), *TRAIN)["iterations"] == 3
    curve, run_dir = read_curve(whole), tmp_path / "killed"
    assert len({output for _, _, output, *_ in curve}) == 3 and all(grad_norm > 0 for *_, grad_norm, _ in curve)
    kill_and_resume_training(capsys, run_dir, whole, 150)
    with EventFile(run_dir / "events.jsonl"):
        assert "has not ended" in fail(capsys, "train", "--resume", str(run_dir), "--train.iterations", "4")
    with EventFile(run_dir / "events.jsonl") as file:  # As if the last checkpoints had been lost.
        file.begin(json.loads(file.read()[0]) | {"iteration": 5, "policy_version": 5})
    assert main(["train", "--resume", str(run_dir), "--train.iterations", "4", "--json"]) == 0
    said = capsys.readouterr().err
    assert "begins anew: the event log is of iteration 6 and policy version 5, the checkpoint has policy" in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_of_training_at_random_moments(capsys, tmp_path) -> None:
    whole = tmp_path / "whole"
    run(capsys, "train", "--run-dir", str(whole), *TRAIN)
    last = count_lines(whole / "events.jsonl")
    for seed in range(10):
        num_events = random.Random(seed).randint(0, last * 3 // 4)
        kill_and_resume_training(capsys, tmp_path / str(seed), whole, num_events)


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
