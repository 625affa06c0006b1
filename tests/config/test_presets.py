"""Presets: found by name or path, extended by `base:`, and those that ship are valid."""

from pathlib import Path

import pytest

from seer_jax.config.presets import find_preset, list_presets, load_config, presets_root, resolve_preset_path
from seer_jax.config.schema import RunConfig
from seer_jax.config.validate import validate
from seer_jax.core.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_that_ships_is_valid(name):
    validate(load_config(name), training=name.startswith("train/"))


def test_a_preset_is_found_by_its_name_and_by_its_kind_and_name():
    assert find_preset("tiny_math") == find_preset("train/tiny_math") == presets_root() / "train" / "tiny_math.yaml"


def test_an_unknown_preset_is_an_error_that_says_what_was_meant():
    with pytest.raises(ConfigError, match=r"no preset 'tiny_mth' \(did you mean tiny_math\?\)"):
        load_config("tiny_mth")
    with pytest.raises(ConfigError, match=r"did you mean train/tiny_math\?"):
        load_config("trian/tiny_math")


def test_a_file_is_laid_over_the_defaults(tmp_path):
    config = load_config(write(tmp_path / "run.yaml", "seed: 5\nrollout:\n  chunk_size: 64\n"))
    assert (config.seed, config.rollout.chunk_size) == (5, 64)
    assert load_config(write(tmp_path / "empty.yaml", "# nothing\n")) == RunConfig()


def test_base_extends_a_preset_or_a_file_beside_it(tmp_path):
    write(tmp_path / "first.yaml", "seed: 5\nrollout: {chunk_size: 64, instances: 3}\n")
    config = load_config(write(tmp_path / "second.yaml", "base: first.yaml\nrollout: {chunk_size: 32}\n"))
    assert (config.seed, config.rollout.chunk_size, config.rollout.instances) == (5, 32, 3)
    assert load_config(write(tmp_path / "third.yaml", "base: train/tiny_math\n")) == load_config("tiny_math")


def test_a_circle_of_bases_is_an_error(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(write(tmp_path / "b.yaml", "base: a.yaml\n"))


def test_the_file_with_the_fault_is_named_even_when_it_is_a_base(tmp_path):
    write(tmp_path / "first.yaml", "sed: 5\n")
    with pytest.raises(ConfigError, match=r"^sed: unknown key in .*first\.yaml \(did you mean seed\?\)"):
        load_config(write(tmp_path / "second.yaml", "base: first.yaml\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"^seed: given twice in .* \(remove line 2 or the other\)"),
        ("rollout:\n  chunk_size: 1\n  chunk_size: 1\n", r"^rollout\.chunk_size: given twice .*line 3"),
        ("seed: [1\n", "is no YAML: .*line 2"),
        ("- 1\n", "holds no settings"),
        ("base: [a, b]\n", "^base: expected a preset's name"),
    ],
)
def test_a_broken_file_is_an_error_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path / "run.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"^config: no file"):
        load_config(str(tmp_path / "nothing.yaml"))


def test_preset_paths_lead_into_the_installation_and_others_stay(tmp_path):
    assert resolve_preset_path("preset:train") == presets_root() / "train"
    assert resolve_preset_path(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"^model\.path: no preset 'preset:model/tiny_mth'"):
        resolve_preset_path("preset:model/tiny_mth")
