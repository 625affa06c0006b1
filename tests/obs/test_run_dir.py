"""Run directories: named after preset and time, never overwritten, hold the resolved configuration."""

from datetime import datetime
from pathlib import Path

import pytest

from seer_jax.config.presets import load_config
from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError
from seer_jax.obs.run_dir import create_run_dir, fill_run_dir

START = datetime(2025, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("name", ["tiny_math", "train/tiny_math", "some/where/tiny_math.yaml"])
def test_the_template_is_filled_with_the_preset_and_the_time(name):
    assert fill_run_dir("runs/{name}-{time}", name, START) == Path("runs/tiny_math-20250304-050607")


def test_the_saved_configuration_reproduces_the_run(tmp_path):
    config = RunConfig(seed=9)
    create_run_dir(tmp_path / "a" / "b", config, resume=False)
    assert load_config(str(tmp_path / "a" / "b" / "config.yaml")) == config


def test_a_directory_that_holds_something_is_only_taken_to_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"^run_dir: .* is not empty \(give a new directory, or --resume it\)"):
        create_run_dir(tmp_path, RunConfig(), resume=False)
    create_run_dir(tmp_path, RunConfig(), resume=True)
    assert (tmp_path / "config.yaml").exists()


def test_a_place_that_cannot_be_written_is_an_error_of_the_configuration(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^run_dir: cannot write to .*file/run"):
        create_run_dir(tmp_path / "file" / "run", RunConfig(), resume=False)
