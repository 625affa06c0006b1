"""Tasks by name: `make_task` turns the `data` section of a configuration into prompts and a reward."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from seer_jax.config.schema import DataConfig
from seer_jax.core.errors import ConfigError
from seer_jax.train.tasks.chain_sum import ChainSum, score_answer
from seer_jax.train.tasks.jsonl import load_jsonl_task
from seer_jax.train.tasks.length_statistics import LengthStatistics, length_statistics
from seer_jax.train.tasks.task import Prompt, RewardFunction, Split, Task

__all__ = ["LengthStatistics", "Prompt", "RewardFunction", "Split", "Task", "length_statistics", "make_task"]


def make_task(data: DataConfig) -> Task:
    """Build the task that a configuration names.

    Args:
        data: The `data` section.

    Returns:
        The task.

    Raises:
        ConfigError: If the task is unknown, a setting that it needs is missing, or its file or reward is unusable.
    """
    builder = TASKS.get(data.task)
    if builder is None:
        raise ConfigError("data.task", f"no task {data.task!r}", f"one of {', '.join(sorted(TASKS))}")
    return builder(data)


def _make_chain_sum(data: DataConfig) -> Task:
    return ChainSum(reward_function=import_reward(data.reward) if data.reward else score_answer)


def _make_jsonl(data: DataConfig) -> Task:
    if data.path is None:
        raise ConfigError("data.path", "is not set, but `data.task` is 'jsonl'", "give the JSONL file")
    if data.reward is None:
        raise ConfigError("data.reward", "is not set, but `data.task` is 'jsonl'", "give package.module:function")
    return load_jsonl_task(data.path, import_reward(data.reward), data.heldout_prompts)


TASKS: dict[str, Callable[[DataConfig], Task]] = {"chain_sum": _make_chain_sum, "jsonl": _make_jsonl}


def import_reward(name: str) -> RewardFunction:
    """Import a reward function, also from the current directory, which `python -m` searches but a script does not.

    Args:
        name: `package.module:function`.

    Returns:
        The function.

    Raises:
        ConfigError: If the name is malformed, the module fails to import or the function is not there.
    """
    module_name, separator, function_name = name.partition(":")
    if not (module_name and separator and function_name):
        raise ConfigError("data.reward", f"{name!r} names no function", "write package.module:function")
    # For good and not just for this import: the module may import its neighbours when it is called.
    if (directory := str(Path.cwd())) not in sys.path:
        sys.path.append(directory)
    try:
        module = importlib.import_module(module_name)
    # The module is the user's: whatever it raises is said, with where to look.
    except Exception as error:
        problem = f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        raise ConfigError("data.reward", problem, "it must be installed or in the current directory") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        problem = f"{module_name!r} has no function {function_name!r}"
        raise ConfigError("data.reward", problem, "write package.module:function")
    return function
