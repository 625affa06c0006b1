"""The verbs hand the right configuration to their jobs and print the right last line."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from seer_jax.cli.main import main
from seer_jax.config.dump import to_yaml
from seer_jax.config.presets import load_config
from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import CapacityError, ProtocolError
from seer_jax.models.config import DecoderConfig


class FakeJobs(SimpleNamespace):
    """Stands for `seer_jax.cli.jobs`: remembers what it was asked, answers what it was told to."""

    def train(self, config, options):
        self.config, self.options = config, options
        if isinstance(self.answer, BaseException):
            options.run_dir.mkdir(parents=True, exist_ok=True)
            raise self.answer
        return self.answer

    def rollout(self, config, options):
        self.config, self.options = config, options
        return [{"policy": policy, "tokens_per_s": 1234.5} for policy, _ in options.variants]


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake = FakeJobs(answer={"reward_after": 0.75})
    monkeypatch.setitem(sys.modules, "seer_jax.cli.jobs", fake)
    monkeypatch.setattr("seer_jax.cli.jobs", fake, raising=False)
    return fake


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """A directory with a `config.json` of 3 layers that keep 16 + 8 values per token."""
    shape = DecoderConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        eos_token_id=(257,),
    )
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    return tmp_path


def test_overrides_and_short_forms_reach_the_job_over_the_preset(jobs):
    argv = ["train", "--config", "tiny_math", "--rollout.chunk-size=32", "--engine.deterministic", "--seed", "7"]
    assert main([*argv, "--policy", "group_round_robin", "--instances=1", "--runtime", "local"]) == 0
    assert (jobs.config.rollout.chunk_size, jobs.config.engine.deterministic, jobs.config.seed) == (32, True, 7)
    rollout = jobs.config.rollout
    assert (rollout.policy, rollout.instances, rollout.runtime) == ("group_round_robin", 1, "local")
    assert jobs.config.train == load_config("tiny_math").train
    assert not jobs.options.json
    assert jobs.options.run_dir.parent == Path("runs")
    assert jobs.options.run_dir.name.startswith("tiny_math-")


def test_training_without_a_preset_named_is_the_main_job(jobs):
    assert main(["train"]) == 0
    assert jobs.config == load_config("tiny_math")


def test_the_last_line_of_stdout_is_the_result_as_json(jobs, capsys):
    assert main(["train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"reward_after": 0.75}
    assert jobs.options.json


def test_a_rollout_prints_its_figures_and_a_comparison_a_list_of_them(jobs, capsys):
    assert main(["rollout", "--policy", "group_round_robin", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"policy": "group_round_robin", "tokens_per_s": 1234.5}
    assert main(["rollout", "--compare", "seer, group_round_robin", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["policy"] for run in runs] == ["seer", "group_round_robin"]
    assert main(["rollout", "--compare", "seer,group_round_robin"]) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading.split() == ["seer", "group_round_robin"]


def test_resuming_takes_the_configuration_of_the_run_and_overrides_it(jobs, tmp_path):
    run_dir = tmp_path / "earlier"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(RunConfig(seed=11)))
    assert main(["train", "--resume", str(run_dir), "--train.iterations", "99"]) == 0
    assert (jobs.config.seed, jobs.config.train.iterations) == (11, 99)
    assert (jobs.options.run_dir, jobs.options.resume) == (run_dir, True)


def test_ctrl_c_says_how_to_go_on(jobs, capsys):
    jobs.answer = KeyboardInterrupt()
    assert main(["train", "--run-dir", "here"]) == 130
    assert "seer-jax train --resume here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(ProtocolError("stale sample"), 1), (CapacityError("a chunk", 9, 3, "pages"), 2)]
)
def test_an_error_of_the_job_is_one_line_and_its_kind_decides_the_exit_code(jobs, capsys, error, code):
    jobs.answer = error
    assert main(["train"]) == code
    assert capsys.readouterr().err == f"seer-jax: error: {error}\n"


def test_a_dry_run_says_what_would_run_and_starts_nothing(jobs, model_dir, capsys):
    argv = ["train", "--dry-run", "--model.path", str(model_dir), "--engine.num-pages", "100"]
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["plan"]["kv_bytes_per_token"] == 3 * (16 + 8) * 4
    assert report["plan"]["kv_bytes_per_instance"] == 100 * 16 * report["plan"]["kv_bytes_per_token"]
    assert report["plan"]["requests_per_iteration"] == 16 * 8
    assert report["config"]["engine"]["num_pages"] == 100
    assert main([*argv, "--engine.kv-dtype", "float8_e4m3fn", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert (plan["kv_dtype"], plan["kv_bytes_per_token"]) == ("float8_e4m3fn", 3 * (16 + 8))
    assert main(argv) == 0
    assert "num_pages: 100" in capsys.readouterr().out
    assert not hasattr(jobs, "config")
    assert not Path("runs").exists()


def test_config_lists_presets_and_shows_one_in_full(capsys):
    assert main(["config", "list"]) == 0
    assert "train/tiny_math" in capsys.readouterr().out.splitlines()
    assert main(["config", "show", "tiny_math"]) == 0
    assert capsys.readouterr().out == to_yaml(load_config("tiny_math"))


def test_doctor_reports_versions_devices_and_the_kernel_implementations(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"python", "jax", "ray", "numpy"} <= set(report["versions"])
    assert report["devices"]
    assert {"mla_attention", "gqa_attention", "kv_update", "kv_update_move", "grouped_matmul"} <= set(report["kernels"])
    assert not [name for name in report["kernels"] if name.startswith("_")]
    assert all(
        re.fullmatch(r"(xla|pallas_tpu|pallas_gpu) \(.*; engine.kernels can name: .*\)", text)
        for text in report["kernels"].values()
    )
    if jax.default_backend() == "cpu":
        expected = "xla (best on cpu; engine.kernels can name: reference)"
        assert report["kernels"]["mla_attention"] == report["kernels"]["gqa_attention"] == expected
    assert set(report["kv_dtypes"]) == {"auto", "float8_e4m3fn"}
    assert report["problems"] == []
    assert main(["doctor"]) == 0
    assert "problems\n  none" in capsys.readouterr().out
