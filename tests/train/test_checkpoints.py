"""Claims about checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.config.schema import RunConfig, TrainConfig
from seer_jax.core.errors import ConfigError
from seer_jax.train.checkpoints import (
    SUBDIRECTORY,
    CheckpointInfo,
    hash_config,
    open_checkpoints,
    restore_latest,
    save_checkpoint,
)
from seer_jax.train.learner import TrainState, make_optimizer


def make_params(width=3, seed=0):
    rng = np.random.default_rng(seed)
    layer = {
        "attn_norm": rng.normal(size=4).astype(np.float32),
        "moe": {"router_bias": rng.normal(size=2).astype(np.float32)},
        "down": rng.normal(size=(width, 4)).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, {"embed": rng.normal(size=(5, 4)).astype(np.float32), "layers": [layer]})


def make_state(seed=0, version=0, width=3, config=None):
    params = make_params(width, seed)
    optimizer = make_optimizer(config or TrainConfig(), params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.cos, params), optimizer.init(params), params)
    return TrainState(params=params, opt_state=opt_state, policy_version=np.asarray(version, np.int32))


def make_info(iteration):
    return CheckpointInfo(iteration=iteration, seed=7, config_sha256=hash_config(RunConfig()))


def save(run_dir, *iterations, keep=2):
    with open_checkpoints(run_dir, keep) as manager:
        for iteration in iterations:
            save_checkpoint(manager, make_state(seed=iteration, version=iteration), make_info(iteration))


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_resume_gets_the_last_state_bit_for_bit_and_knows_where_the_run_stood(tmp_path):
    save(tmp_path, 4, 8)
    state, info = restore_latest(tmp_path, make_state())
    assert_same_bits(state, make_state(seed=8, version=8))
    assert info == make_info(8)


def test_a_relative_run_directory_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("run", 1)
    assert restore_latest("run", make_state())[1].iteration == 1


def test_only_the_newest_are_kept_and_saving_one_again_changes_nothing(tmp_path):
    save(tmp_path, 1, 2, 3, 3)
    assert sorted(path.name for path in (tmp_path / SUBDIRECTORY).iterdir()) == ["2", "3"]


def test_a_run_without_checkpoint_starts_afresh_and_a_missing_one_is_refused(tmp_path):
    assert restore_latest(tmp_path, make_state()) is None
    save(tmp_path)
    assert restore_latest(tmp_path, make_state()) is None
    with pytest.raises(ConfigError, match="--resume: no run directory"):
        restore_latest(tmp_path / "misspelt", make_state())
    assert not (tmp_path / "misspelt").exists()


def test_a_checkpoint_of_another_shape_names_the_first_leaf_and_both_shapes(tmp_path):
    save(tmp_path, 1)
    expected = r"params.layers.0.down is float32\[3, 4\] in .*/checkpoints/1, float32\[6, 4\] in this run.*model.path"
    with pytest.raises(ConfigError, match=expected):
        restore_latest(tmp_path, make_state(width=6))


def test_a_checkpoint_with_other_leaves_names_the_missing_one(tmp_path):
    save(tmp_path, 1)
    target = make_state()
    target.params["lm_head"] = jnp.zeros((4, 5))
    with pytest.raises(ConfigError, match=r"params.lm_head is absent in .*, float32\[4, 5\] in this run"):
        restore_latest(tmp_path, target)


def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(tmp_path):
    script = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from test_checkpoints import make_info, make_state, open_checkpoints, save_checkpoint
with open_checkpoints(sys.argv[1], 2) as manager:
    save_checkpoint(manager, make_state(seed=1, version=1), make_info(1))
    state = make_state(seed=2, version=2)
    state.params["embed"] = np.random.default_rng(0).random((4096, 8192))  # 256 MiB: long enough to be killed in
    print("saving", flush=True)
    save_checkpoint(manager, state, make_info(2))
"""
    directory = tmp_path / SUBDIRECTORY
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saving\n"
        while not any(path.name.startswith("2") for path in directory.iterdir()):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and len(list(directory.iterdir())) == 2, "killed half-way"

    state, info = restore_latest(tmp_path, make_state())
    assert info.iteration == 1
    assert_same_bits(state, make_state(seed=1, version=1))
    save(tmp_path, 2)
    assert restore_latest(tmp_path, make_state())[1].iteration == 2
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"], "the torn one is cleaned away"


def test_the_configuration_hash_sees_every_setting_but_the_run_directory():
    assert hash_config(RunConfig(run_dir="elsewhere")) == hash_config(RunConfig())
    assert hash_config(RunConfig(train=TrainConfig(clip_low=0.1))) != hash_config(RunConfig())
