"""The walls of docs/adr/0001-walls.md stand."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("seer_jax", "kernels_pallas")


def test_the_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    finished = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken." in finished.stdout


def test_importing_the_package_imports_no_jax():
    script = "import seer_jax, sys; assert not {'jax', 'flax', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_host_logic_configuration_and_observation_run_without_jax():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for package in ("core", "config", "obs", "sim")
        for file in sorted((ROOT / "seer_jax" / package).rglob("*.py"))
    ]
    script = f"""
import importlib, sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "ray"):
    sys.modules[name] = None
for module in {modules!r}:
    importlib.import_module(module)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_files_stay_short_enough_to_be_read_from_top_to_bottom():
    lengths = {file: len(file.read_text().splitlines()) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    median = sorted(lengths.values())[len(lengths) // 2]
    assert median < 150
    too_long = {str(file.relative_to(ROOT)): length for file, length in lengths.items() if length > 350}
    assert not too_long


def test_the_readme_has_the_command_that_installs_and_tests():
    script = f"source {ROOT}/.ci/readme.sh && readme_command {ROOT}/README.md test-command"
    finished = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=10)
    assert finished.returncode == 0, finished.stderr
    assert "pip install" in finished.stdout
    assert "pytest" in finished.stdout
