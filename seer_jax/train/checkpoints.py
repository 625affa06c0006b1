"""Checkpoints of the learner, by orbax: weights, optimizer state, policy version and where the run stood.

Random numbers need no state of their own: every draw is keyed by (seed, iteration or policy version, request).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError
from seer_jax.train.learner import TrainState

SUBDIRECTORY = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says besides arrays.

    Attributes:
        iteration: Iterations finished; the run goes on with this one (they count from 0).
        seed: `RunConfig.seed`.
        config_sha256: See `hash_config`; a resumed run that differs is another run, and may say so.
    """

    iteration: int
    seed: int
    config_sha256: str


def hash_config(config: RunConfig) -> str:
    """Hash every setting but `run_dir`, which may move."""
    values = dataclasses.asdict(config)
    del values["run_dir"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_checkpoints(run_dir: str | Path, keep: int) -> ocp.CheckpointManager:
    """Open a run's checkpoints for writing; close it by `with` or `close()`.

    Args:
        run_dir: The run directory; created if missing.
        keep: Checkpoints kept; older ones are deleted.

    Returns:
        The manager that `save_checkpoint` wants.
    """
    return _open(run_dir, ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True))


def save_checkpoint(manager: ocp.CheckpointManager, state: TrainState, info: CheckpointInfo) -> None:
    """Write a checkpoint under its iteration and wait until it is complete.

    Waiting costs fractions of a second and buys safety: the next update donates the optimizer state's buffers, which on
    CPU an asynchronous writer could still be reading. A directory gets its final name only when it is complete (orbax),
    so a save that is killed leaves the previous checkpoint the latest one. Saving an iteration again does nothing.

    Args:
        manager: From `open_checkpoints`.
        state: The learner's state.
        info: Where the run stands.
    """
    items = {"state": ocp.args.StandardSave(state), "info": ocp.args.JsonSave(dataclasses.asdict(info))}
    manager.save(info.iteration, args=ocp.args.Composite(**items))
    manager.wait_until_finished()


def restore_latest(run_dir: str | Path, target: TrainState) -> tuple[TrainState, CheckpointInfo] | None:
    """Read the latest complete checkpoint.

    Args:
        run_dir: The run directory.
        target: A state of the wanted shapes, types and placement: a fresh learner's, arrays or `ShapeDtypeStruct`s.

    Returns:
        State and info, or None if the run has no complete checkpoint yet.

    Raises:
        ConfigError: If there is no such directory, or a leaf of the checkpoint differs from the target's.
    """
    if not Path(run_dir).is_dir():
        raise ConfigError("--resume", f"no run directory {str(run_dir)!r}", "give the directory of an earlier run")
    if not (Path(run_dir) / SUBDIRECTORY).is_dir():
        return None
    with _open(run_dir, ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        _check_fit(manager.item_metadata(step)["state"].tree, target, f"{manager.directory}/{step}")
        items = {"state": ocp.args.StandardRestore(jax.tree.map(_abstract, target)), "info": ocp.args.JsonRestore()}
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    return restored["state"], CheckpointInfo(**restored["info"])


def _open(run_dir: str | Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    # orbax refuses relative paths, and from a background thread at that.
    directory = Path(run_dir).expanduser().absolute() / SUBDIRECTORY
    handlers = {"state": ocp.StandardCheckpointHandler(), "info": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _check_fit(saved: Any, target: TrainState, directory: str) -> None:
    """Compare names, shapes and types leaf by leaf; parameters first, as the optimizer's leaves only mirror them."""
    saved, wanted = _describe_leaves(saved), _describe_leaves(target)
    for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith("params."), name)):
        if saved.get(name) != wanted.get(name):
            raise ConfigError(
                "--resume",
                f"{name} is {saved.get(name, 'absent')} in {directory}, {wanted.get(name, 'absent')} in this run",
                "resume with the model.path and the settings that the run was started with",
            )


def _describe_leaves(tree: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
