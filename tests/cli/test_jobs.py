"""The verbs run for real, small: the shipped preset and checkpoint, in this process."""

import json
from pathlib import Path

import numpy as np
import pytest

from seer_jax.cli.main import main
from seer_jax.config.presets import load_config
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.eventlog import decode_events, replay
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.core.scheduling import make_policy

SMALL = (
    "--runtime", "local", "--instances", "1", "--json",
    "--rollout.num-groups", "2", "--rollout.group-size", "4", "--rollout.chunk-size", "16",
    "--sampling.max-tokens", "40", "--engine.max-model-len", "208", "--engine.max-num-seqs", "4",
    "--engine.max-prefill-tokens", "32", "--engine.num-pages", "20", "--data.heldout-prompts", "4",
)  # fmt: skip


SOME_TIMES = MeasuredStepTimes(
    device="test", model="test", jax="0", contexts=(64, 208), plain_sizes=(4,), plain_s=((0.01, 0.01),),
    verify_sizes=(16,), verify_s=((0.02, 0.02),),
)  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    """Run a verb; the object on the last line of stdout."""
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rollout_compares_policies_and_leaves_samples_and_a_log_that_replays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = ("rollout", "--compare", "seer,group_round_robin", "--run-dir", str(run_dir), "--engine.deterministic",
            "--engine.expert-ids")  # fmt: skip
    trace = tmp_path / "trace.json"
    runs = run(capsys, *argv, "--trace", str(trace), *SMALL)["runs"]
    assert [figures["policy"] for figures in runs] == ["seer", "group_round_robin"]
    expected = {
        "policy", "num_requests", "generated_tokens", "rollout_time_s", "tokens_per_s", "tail_time_s",
        "num_preemptions", "max_kv_utilization", "output_sha256", "length_limit_over_mean", "length_group_correlation",
    }  # fmt: skip
    assert all(expected <= figures.keys() for figures in runs)
    assert runs[0]["output_sha256"] == runs[1]["output_sha256"]
    assert runs[0]["num_chunks"] > runs[1]["num_chunks"] == 8
    samples = [json.loads(line) for line in (run_dir / "0-seer" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert all(len(sample["token_ids"]) == len(sample["logprobs"]) for sample in samples)
    assert all(sample["prompt"].startswith("a") and "=" in sample["response"] for sample in samples)
    with np.load(run_dir / "0-seer" / "expert_ids.npz") as experts:
        for sample in samples:
            ids = experts[f"{sample['group_id']}-{sample['index']}"]
            assert ids.dtype == np.int16 and ids.ndim == 3 and len(ids) == len(sample["token_ids"]) and ids.min() >= 0
    settings = load_config(str(run_dir / "config.yaml")).rollout
    lines = (run_dir / "0-seer" / "events.jsonl").read_text().splitlines()
    commands = list(replay(decode_events(lines), RolloutDriver(make_policy("seer", settings))))
    assert type(commands[-1]).__name__ == "IterationDone"
    profile = tmp_path / "profile.json"
    profile.write_text(SOME_TIMES.to_json())
    simulated = run(capsys, "simulate", "--replay", str(run_dir), "--profile", str(profile), "--json")["rollouts"]
    assert [row["policy"] for row in simulated] == ["seer", "group_round_robin"]
    for row, figures in zip(simulated, runs, strict=True):
        assert row["rollout_time_s"] == figures["rollout_time_s"]
        # 8 requests of up to 40 tokens in 4 slots: two waves at least, of steps of 10 ms and some prefill.
        assert 0.01 * figures["generated_tokens"] / 4 <= row["predicted_rollout_time_s"] < 2 * 0.01 * 40 * 8
        assert row["replayed_events"] == len((run_dir / row["name"] / "events.jsonl").read_text().splitlines())
    shown = json.loads(trace.read_text())["traceEvents"]
    assert [event["args"]["name"] for event in shown if event["name"] == "process_name"] == [
        "0 seer:off instance 0", "1 group_round_robin:off instance 0",
    ]  # fmt: skip
    assert sum(event["ph"] == "X" for event in shown) == sum(figures["num_chunks"] for figures in runs)


def test_options_beyond_the_paper_run_for_real_are_counted_and_change_no_token(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--rollout.length-estimator", "posterior", "--rollout.prefetch-chunks", "0")
    argv = ("rollout", "--compare", "seer,divided", "--engine.deterministic", "--run-dir", str(tmp_path / "run"))
    seer, divided = run(capsys, *argv, *SMALL, *options)["runs"]
    assert seer["output_sha256"] == divided["output_sha256"]
    assert seer["fired_posterior"] > divided["fired_posterior"] == 0


def test_rollout_compares_speculation_by_a_profile_and_says_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(tmp_path / "profile.json")
    report = run(capsys, "profile", "--out", file, *SMALL)
    assert [row["requests"] for row in report["rows"]] == [2, 4] and report["out"] == file
    assert all(row["plain_ms"] > 0 and row["drafts_of_2_must_yield"] > 0 for row in report["rows"])
    argv = ("rollout", "--compare", "seer:off,seer:grouped", "--run-dir", str(tmp_path / "run"), *SMALL)
    # With grouped's own profile; then drafts whatever they cost.
    first, second = run(capsys, *argv, "--speculation.profile", file)["runs"]
    assert [first["speculation"], second["speculation"]] == ["off", "grouped"]
    assert first["drafted_tokens"] == 0 and first["output_sha256"] == second["output_sha256"]
    fixed = run(capsys, "rollout", "--speculation", "grouped_tree", "--speculation.budget", "fixed",
                "--run-dir", str(tmp_path / "tree"), *SMALL)  # fmt: skip
    assert fixed["output_sha256"] == first["output_sha256"] and fixed["accepted_tokens"] > 0
    again = ("rollout", "--run-dir", str(tmp_path / "again"), *SMALL)
    assert main([*again, "--speculation", "grouped_tree", "--speculation.profile", file]) == 2
    assert "speculation.profile" in capsys.readouterr().err


def test_train_leaves_metrics_checkpoint_and_model_that_can_be_resumed_and_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    result = run(capsys, "train", "--run-dir", str(run_dir), "--train.iterations", "1", *SMALL)
    expected = {"reward_before", "reward_after", "iterations", "wall_s", "rollout_tokens", "logprob_gap_mean"}
    assert expected <= result.keys() and result["iterations"] == 1 and result["logprob_gap_mean"] < 1e-5
    resumed = run(capsys, "train", "--resume", str(run_dir), "--train.iterations", "2", "--json")
    assert resumed["iterations"] == 1
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if record["kind"] == "iteration"] == [1, 2]
    again = run(capsys, "rollout", "--model.path", str(run_dir / "model"), "--run-dir", str(tmp_path / "again"), *SMALL)
    assert again["num_requests"] == 8
