"""Entry point of `seer-jax`: picks the verb, turns errors into one line and an exit code."""

import importlib
import sys
from collections.abc import Sequence

import seer_jax
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import CapacityError, ConfigError, SeerError

VERBS = {
    "train": "improve a model by GRPO with Seer's rollout",
    "rollout": "sample responses once and measure the scheduling",
    "bench": "measure the drafter on recorded responses: acceptance, latency, size",
    "profile": "time the steps of a configuration on this machine, for draft budgets",
    "simulate": "repeat the paper's experiments at its scale, in simulation",
    "config": "list the presets, show one with all its settings",
    "doctor": "say what this machine and this installation can do",
}
"""Each verb is a module of this package with `main(argv) -> exit code`, imported only when it is called."""

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `seer-jax`.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage())
            return 0 if arguments else EXIT_BAD_INPUT
        if arguments[0] == "--version":
            print(seer_jax.__version__)
            return 0
        if arguments[0] not in VERBS:
            raise ConfigError(arguments[0], "unknown verb", did_you_mean(arguments[0], VERBS))
        return importlib.import_module(f"seer_jax.cli.{arguments[0]}").main(arguments[1:])
    except SeerError as error:
        print(f"seer-jax: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ConfigError | CapacityError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("seer-jax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _usage() -> str:
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return f"usage: seer-jax <verb> [options]\n\n{verbs}\n\n`seer-jax <verb> --help` lists the options of a verb."
