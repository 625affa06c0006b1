"""Data-parallel ranks: the tokens of one device, whatever rank has a request and wherever its KV goes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seer_jax.config.schema import ShardingConfig
from tests.engine.ranks import CHECKS

ROOT = Path(__file__).resolve().parents[2]
MESHES = {"data 2": ShardingConfig(data=2), "data 2 x tensor 2": ShardingConfig(data=2, tensor=2)}


@pytest.fixture(scope="module", params=[pytest.param("data 2", marks=pytest.mark.slow), "data 2 x tensor 2"])
def outcomes(request: pytest.FixtureRequest) -> dict[str, str]:
    """What went wrong in each check, run in a process with as many devices as the mesh has."""
    mesh = MESHES[request.param]
    flags = f"--xla_force_host_platform_device_count={mesh.data * mesh.tensor}"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.engine.ranks", json.dumps(dataclasses.asdict(mesh))],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return {name: error for line in finished.stdout.splitlines() for name, error in json.loads(line).items()}


@pytest.mark.parametrize("check", CHECKS)
def test_an_engine_with_ranks_gives_the_tokens_of_one_device(outcomes: dict[str, str], check: str) -> None:
    assert outcomes[check] == ""
