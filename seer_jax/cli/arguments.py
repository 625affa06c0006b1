"""Command-line arguments: tyro makes the form from dataclasses, `config.decode` reads what was typed into it.

tyro would convert values itself and explain faults in a box of its own; instead every value stays text until
`decode` reads it, so that the command line and YAML accept the same and complain alike, in one line.
"""

import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from seer_jax.config.decode import CommandLineText, decode, iterate_settings
from seer_jax.config.presets import load_config
from seer_jax.config.schema import RunConfig
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError

A = TypeVar("A")

SHORT_FORMS = {
    "--policy": "--rollout.policy",
    "--instances": "--rollout.instances",
    "--runtime": "--rollout.runtime",
}

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag without a `--no-` twin."""

Settings = Annotated[RunConfig, tyro.conf.arg(name="")]
"""The whole configuration, as dotted options."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The option that decides the defaults of all others, so it is read first."""

    config: str = ""
    resume: str = ""


def parse_job(cls: type[A], argv: Sequence[str], *, prog: str) -> A:
    """Parse the arguments of a verb that runs a configuration.

    Args:
        cls: Frozen dataclass of the verb's options with fields `config: str` and `run: Settings`; its docstring is
            the help text.
        argv: Arguments after the verb.
        prog: How the verb is called, such as `seer-jax train`.

    Returns:
        The options; `run` is the preset, or the configuration of the resumed run, with the overrides in place.

    Raises:
        ConfigError: For anything that the user got wrong.
        SystemExit: With 0 after `--help`.
    """
    argv = [_expand_short_form(argument) for argument in argv]
    source, _ = tyro.cli(_Source, args=argv, add_help=False, return_unknown_args=True, registry=_TEXT)
    defaults = cls()
    base = _load_resumed(source) if source.resume else load_config(source.config or defaults.config)
    parsed = parse_options(argv, prog=prog, defaults=replace(defaults, run=base))
    return replace(parsed, run=decode(RunConfig, asdict(parsed.run), base=base))


def parse_options(argv: Sequence[str], *, prog: str, defaults: A) -> A:
    """Parse the arguments of a verb; whatever was typed is still text.

    Args:
        argv: Arguments after the verb.
        prog: How the verb is called.
        defaults: A frozen dataclass that gives the options, their defaults and, in its docstring, the help text.

    Returns:
        The options.

    Raises:
        ConfigError: For an unknown argument.
        SystemExit: With 0 after `--help`.
    """
    parsed, unknown = tyro.cli(
        type(defaults), prog=prog, args=argv, default=defaults, return_unknown_args=True, registry=_TEXT
    )
    if unknown:
        raise _unknown_argument(unknown[0], defaults)
    return parsed


_TEXT = ConstructorRegistry()


@_TEXT.primitive_rule
def _keep_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Let tyro take any text for any setting; flags stay flags.

    Any number of words is taken, since tyro answers to a missing one with a box instead of an error.
    """
    alternatives = get_args(info.type) if get_origin(info.type) is types.UnionType else (info.type,)
    if get_origin(info.type) is Literal:
        metavar = "{" + ",".join(get_args(info.type)) + "}"
    elif alternatives[0] in (int, float, str):
        metavar = "|".join("null" if a is types.NoneType else a.__name__.upper() for a in alternatives)
    else:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: CommandLineText(" ".join(words)),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["null" if value is None else str(value)],
    )


def _load_resumed(source: _Source) -> RunConfig:
    if source.config:
        raise ConfigError("resume", f"{source.resume!r} brings its own configuration", "leave out --config")
    file = Path(source.resume).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError("resume", f"{source.resume!r} holds no config.yaml", "give the directory of an earlier run")
    return load_config(str(file))


def _expand_short_form(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return SHORT_FORMS.get(name, name) + equals + value


def _unknown_argument(argument: str, defaults: Any) -> ConfigError:
    if not argument.startswith("-"):
        return ConfigError(argument, "unexpected argument", "options look like --name value, flags like --name")
    name = argument.partition("=")[0]
    known = [f"--{path.removeprefix('run.').replace('_', '-')}" for path, _ in iterate_settings(defaults)]
    hint = did_you_mean(name.replace("_", "-"), [*known, *SHORT_FORMS])
    return ConfigError(name, "unknown option", hint if hint.startswith("did") else "see --help")
