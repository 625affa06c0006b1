"""Named configurations: YAML files below `configs/`, which the wheel ships as `seer_jax/_presets`."""

from pathlib import Path
from typing import Any

import yaml

from seer_jax.config.decode import decode
from seer_jax.config.schema import RunConfig
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError

PRESET_PREFIX = "preset:"
WORKLOADS = "sim"
"""Directory of what is no run to configure but a workload to simulate (`seer_jax.sim.workloads`)."""


def presets_root() -> Path:
    """Return the directory of the presets: inside an installed package, else beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_presets"
    return installed if installed.is_dir() else package.parent / "configs"


def list_presets(*, workloads: bool = False) -> dict[str, Path]:
    """Return the presets that ship with seer_jax as `kind/name`, with their files: runs, or simulated workloads."""
    root = presets_root()
    files = [file for file in sorted(root.glob("*/*.yaml")) if (file.parent.name == WORKLOADS) == workloads]
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def find_preset(name: str, *, workloads: bool = False) -> Path:
    """Find the file that `--config` or `base:` names.

    Args:
        name: `tiny_math`, `train/tiny_math`, or the path of a YAML file.
        workloads: Look among the simulated workloads, not the runs.

    Returns:
        The file.

    Raises:
        ConfigError: If there is no such preset or file, or several presets have that name.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).expanduser().is_file():
            raise ConfigError("config", f"no file {name!r}", "give the path of a YAML file, or a preset's name")
        return Path(name).expanduser()
    presets = list_presets(workloads=workloads)
    matches = [preset for preset in presets if name in (preset, preset.partition("/")[2])]
    if len(matches) > 1:
        raise ConfigError("config", f"{name!r} names several presets", f"one of {', '.join(matches)}")
    if not matches:
        known = presets if "/" in name else [preset.partition("/")[2] for preset in presets]
        raise ConfigError("config", f"no preset {name!r}", did_you_mean(name, known))
    return presets[matches[0]]


def load_config(name: str) -> RunConfig:
    """Load a preset or a file over the defaults, or over the preset that its `base:` names.

    Args:
        name: As for `find_preset`.

    Returns:
        The configuration; decoded strictly, not yet validated.

    Raises:
        ConfigError: If the file is missing, is no YAML, holds unknown keys or wrong types, or extends itself.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    next_name: str | None = name
    while next_name is not None:
        file = find_preset(next_name)
        if any(file.samefile(seen) for seen, _ in chain):
            raise ConfigError("base", f"{file} extends itself", "remove one `base:` of the circle")
        values = read_yaml(file)
        next_name = values.pop("base", None)
        if next_name is not None and not isinstance(next_name, str):
            raise ConfigError("base", f"expected a preset's name, got {next_name!r} in {file}", "one preset only")
        beside = file.parent / next_name if next_name else None
        if beside is not None and beside.suffix in (".yaml", ".yml") and beside.is_file():
            next_name = str(beside)
        chain.append((file, values))
    config = RunConfig()
    for file, values in reversed(chain):
        config = decode(RunConfig, values, base=config, source=str(file))
    return config


def resolve_preset_path(path: str) -> Path:
    """Turn `preset:model/tiny_math` into the directory that ships with seer_jax; other paths stay as they are.

    Raises:
        ConfigError: If nothing of that name ships.
    """
    if not path.startswith(PRESET_PREFIX):
        return Path(path).expanduser()
    name = path.removeprefix(PRESET_PREFIX)
    root = presets_root()
    resolved = root / name
    if not resolved.exists():
        shipped = [found.relative_to(root).as_posix() for found in root.glob("*/*") if found.is_dir()]
        known = [PRESET_PREFIX + directory for directory in shipped]
        hint = did_you_mean(path, known) if known else "no such directories ship with this installation"
        raise ConfigError("model.path", f"no preset {path!r}", hint)
    return resolved


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a mapping; a key given twice is an error, which PyYAML would let pass.

    Raises:
        ConfigError: If the file is no YAML or no mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
        _forbid_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader), file)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError("config", f"{file} is no YAML: {problem}", "see the line that it names") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("config", f"{file} holds no settings", "write `section:` and `  key: value` below it")
    return values


def _forbid_duplicate_keys(node: yaml.Node | None, file: Path, path: str = "") -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        key_path = f"{path}.{key.value}" if path else str(key.value)
        if key.value in seen:
            raise ConfigError(key_path, f"given twice in {file}", f"remove line {key.start_mark.line + 1} or the other")
        seen.add(key.value)
        _forbid_duplicate_keys(value, file, key_path)
