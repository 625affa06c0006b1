"""`seer-jax config`: what presets there are and what they set."""

from collections.abc import Sequence

from seer_jax.config.dump import to_yaml
from seer_jax.config.presets import list_presets, load_config
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError

USAGE = """usage: seer-jax config list
       seer-jax config show NAME_OR_PATH

`list` prints the presets, `show` all settings of one as YAML, defaults included."""


def main(argv: Sequence[str]) -> int:
    """Print presets, or one of them.

    Args:
        argv: Arguments after `config`.

    Returns:
        Exit code.

    Raises:
        ConfigError: For an unknown action or preset.
    """
    match list(argv):
        case [] | ["-h"] | ["--help"]:
            print(USAGE)
        case ["list"]:
            print("\n".join(list_presets()))
        case ["show", name]:
            print(to_yaml(load_config(name)), end="")
        case ["list" | "show" as action, *rest]:
            raise ConfigError(f"config {action}", f"cannot take {' '.join(rest) or 'nothing'!r}", "see --help")
        case [action, *_]:
            raise ConfigError("config", f"unknown action {action!r}", did_you_mean(action, ["list", "show"]))
    return 0
