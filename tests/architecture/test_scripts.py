"""Scripts find what they import: nothing else in the suite runs most of them."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
OPTIONAL = {"make_oracle_fixtures": ("torch", "transformers")}
"""What a script needs that installing seer_jax for development does not bring."""


@pytest.mark.parametrize("name", sorted(file.stem for file in SCRIPTS.glob("*.py")))
def test_a_script_can_be_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in OPTIONAL.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(SCRIPTS)
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="script")
