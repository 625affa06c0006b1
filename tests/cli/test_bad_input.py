"""Whatever the user gets wrong: one line with field, value and fix, exit code 2, and nothing heavy was started."""

import subprocess
import sys

import pytest

from seer_jax.cli.main import main

BAD_INPUT = [
    (["trian"], "trian: unknown verb (did you mean train?)"),
    (["train", "--config", "tiny_mth"], "config: no preset 'tiny_mth' (did you mean tiny_math?)"),
    (["train", "--config", "nothing.yaml"], "config: no file 'nothing.yaml'"),
    (["train", "--config"], "config: no preset ''"),
    (
        ["train", "--rollout.chunk-sze", "32"],
        "--rollout.chunk-sze: unknown option (did you mean --rollout.chunk-size?)",
    ),
    (["train", "--chunk-size=32"], "--chunk-size: unknown option (did you mean --rollout.chunk-size?)"),
    (
        ["train", "--rollout.chunk-size", "many"],
        "rollout.chunk_size: expected an integer, got 'many' (for example 128)",
    ),
    (["train", "--rollout.chunk-size"], "rollout.chunk_size: expected an integer, got ''"),
    (["train", "--rollout.chunk-size", "0"], "rollout.chunk_size: is 0 (give at least 1)"),
    (["train", "--seed", "-1"], "seed: is -1"),
    (["train", "--engine.deterministic=no"], "no: unexpected argument"),
    (["train", "tiny_math"], "tiny_math: unexpected argument"),
    (["train", "--policy", "sear"], "rollout.policy: 'sear' is not a choice (did you mean seer?)"),
    (["train", "--engine.num-pages", "8"], "engine.num_pages: is 8, but one request"),
    (["train", "--sampling.top-p", "0.9"], "sampling.top_p: is 0.9, but GRPO"),
    (["train", "--resume", "nothing"], "resume: 'nothing' holds no config.yaml"),
    (["train", "--resume", "x", "--config", "tiny_math"], "resume: 'x' brings its own configuration"),
    (["rollout", "--compare", "seer,fifo"], "compare: no policy 'fifo' (one of divided, group_round_robin, seer)"),
    (["rollout", "--compare", "seer:grouped,seer:groped"], "compare: no speculation 'groped' (did you mean grouped?)"),
    (["rollout", "--compare", "seer:"], "compare: no speculation ''"),
    (["rollout", "--speculation.memory-tokens", "9"], "speculation.memory_tokens: is 9, but a rollout has no earlier"),
    (["rollout", "--speculation.profile", "no.json"], "speculation.profile: no file 'no.json'"),
    (["rollout", "--speculation.max-verify-tokens", "9"], "speculation.max_verify_tokens: is 9, below engine.max_num"),
    (["rollout", "--speculation.max-draft-tokens", "33"], "speculation.max_draft_tokens: is 33"),
    (["rollout", "--trace", "trace.txt"], "trace: 'trace.txt' is no trace's name (end it in .json or .json.gz)"),
    (["profile", "--out", "no/such/file.json"], "out: 'no/such/file.json' cannot be written"),
    (["rollout", "--dry-run", "--data.task", "chain_sm"], "data.task: no task 'chain_sm'"),
    (["rollout", "--dry-run", "--model.path", "nothing"], "model.path: nothing/config.json does not exist"),
    (
        ["rollout", "--dry-run", "--sampling.max-tokens", "400"],
        "engine.max_model_len: is 544, but the longest prompt 158 + sampling.max_tokens 400 = 558",
    ),
    (["rollout", "--dry-run", "--sharding.tensor", "3"], "sharding.tensor: 3 does not divide the model's"),
    (["rollout", "--dry-run", "--sampling.stop-token-ids", "257,999"], "sampling.stop_token_ids: 999 is outside"),
    (["rollout", "--sampling.stop-token-ids", "1", "x"], "sampling.stop_token_ids: expected a list of integers"),
    (["config", "show"], "config show: cannot take 'nothing'"),
    (["config", "shw"], "config: unknown action 'shw' (did you mean show?)"),
    (["doctor", "--jsn"], "--jsn: unknown option (did you mean --json?)"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT, ids=[" ".join(argv) for argv, _ in BAD_INPUT])
def test_bad_input_gives_one_clear_line_and_exit_code_2(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"seer-jax: error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_in_a_file_is_named_with_the_file(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rollout:\n  chunk_sze: 32\n")
    assert main(["train", "--config", str(file)]) == 2
    expected = f"seer-jax: error: rollout.chunk_sze: unknown key in {file} (did you mean chunk_size?)\n"
    assert capsys.readouterr().err == expected


def test_help_configurations_and_bad_arguments_do_not_wait_for_jax():
    script = """
import contextlib, sys
import seer_jax
from seer_jax.cli.main import main
for argv in (["--help"], ["train", "--help"], ["config", "show", "tiny_math"], ["rollout", "--seed", "x"]):
    with contextlib.suppress(SystemExit):
        main(argv)
loaded = {"jax", "flax", "ray"} & set(sys.modules)
assert not loaded, loaded
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "seed: expected an integer, got 'x'" in finished.stderr
