"""`seer-jax doctor`: what this machine and this installation can do, and what is wrong with them."""

import importlib
import os
import pkgutil
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seer_jax.cli.arguments import Switch, parse_options
from seer_jax.config.presets import list_presets
from seer_jax.config.schema import EngineConfig
from seer_jax.core.errors import ConfigError
from seer_jax.kvpool.mooncake_client import load_store_class
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.tables import print_summary

DISTRIBUTIONS = (
    "seer_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "ray", "numpy", "safetensors",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Say what this machine and this installation can do; exit code 1 if something is wrong."""

    json: Switch = False
    """The last line of stdout is one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Examine and print.

    Args:
        argv: Arguments after `doctor`.

    Returns:
        0, or 1 if there are problems.

    Raises:
        ConfigError: For an unknown argument.
    """
    arguments = parse_options(argv, prog="seer-jax doctor", defaults=DoctorArguments())
    report = examine()
    if arguments.json:
        print(to_json_line(report))
    else:
        for section, content in report.items():
            if isinstance(content, dict):
                print_summary(content, title=section)
            else:
                print(f"{section}\n" + "\n".join(f"  {line}" for line in content or ["none"]))
            print()
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Look at everything that a run depends on.

    Returns:
        Sections by name; `problems` lists what is wrong, one sentence each.
    """
    problems: list[str] = []
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in DISTRIBUTIONS},
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        },
        "devices": _list_devices(problems),
        "compilation_cache": _measure_compilation_cache(),
        "kernels": _list_kernels(),
        "kv_dtypes": _list_kv_dtypes(),
        "kvpool_backends": {
            "embedded": "memory and disk of each instance",
            "ray": "an owner per node, with --runtime ray" if find_spec("ray") else "ray is not installed",
            "mooncake": _find_mooncake(),
        },
        "presets": list(list_presets()),
        "problems": problems + _check_ray() + _check_run_dir(),
    }


def _find_mooncake() -> str:
    try:
        load_store_class()
    except ConfigError as error:
        return f"{error.message} ({error.hint})"
    return "in a store that runs already (scripts/start_mooncake.py)"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _list_devices(problems: list[str]) -> list[str]:
    import jax

    try:
        return [f"{device.platform} {device.id}: {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:
        problems.append(f"jax finds no device: {error}")
        return []


def _measure_compilation_cache() -> dict[str, Any]:
    directory = Path(str(EngineConfig().compilation_cache_dir)).expanduser()
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {"directory": str(directory), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def _list_kernels() -> dict[str, str]:
    """Say which implementation serves each operation here when none is named, why, and which others run here."""
    import jax

    import kernels_pallas
    from kernels_pallas._dispatch import PREFERRED, choose, why_not_device

    kernels, device = {}, jax.devices()[0]
    wrong_device = why_not_device(PREFERRED.get(device.platform, ""), device)
    for module in pkgutil.iter_modules(kernels_pallas.__path__):
        if module.ispkg and not module.name.startswith("_"):
            api = importlib.import_module(f"kernels_pallas.{module.name}.api")
            for table, implementations in vars(api).items():
                if table.endswith("IMPLEMENTATIONS"):
                    operation = f"{module.name}_{table.lower()}".removesuffix("_implementations")
                    choice = choose(implementations, device.platform)
                    here = [name for name in implementations if why_not_device(name, device) is None]
                    others = ", ".join(name for name in here if name != choice.name)
                    reason = wrong_device or choice.reason
                    kernels[operation] = f"{choice.name} ({reason}; engine.kernels can name: {others})"
    return kernels


def _list_kv_dtypes() -> dict[str, str]:
    """Say what attends to each type of cache that `engine.kv_dtype` may name."""
    import jax

    on_tpu = "pallas_tpu if engine.page_size is a multiple of 32, else xla"
    return {
        "auto": "model.dtype, served as above",
        "float8_e4m3fn": {"tpu": on_tpu, "gpu": "xla, or what engine.kernels names"}.get(jax.default_backend(), "xla"),
    }


def _check_ray() -> list[str]:
    try:
        importlib.import_module("ray")
    except ImportError as error:
        return [f"ray cannot be imported, so only --runtime local works: {error}"]
    return []


def _check_run_dir() -> list[str]:
    here = Path.cwd()
    return [] if os.access(here, os.W_OK) else [f"{here} is not writable, so give --run-dir another place"]
