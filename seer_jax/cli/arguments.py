"""Command-line arguments: tyro makes the form from dataclasses, `config.decode` reads what was typed into it.

tyro would convert values itself and explain faults in a box of its own; instead it collects text in plain mappings,
and `decode` reads those as it reads YAML: the command line and YAML accept the same and complain alike, in one line.
"""

import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from seer_jax.config.decode import CommandLineText, decode, iterate_settings
from seer_jax.config.docs import read_field_docs
from seer_jax.config.presets import load_config
from seer_jax.config.schema import ChaosConfig, RunConfig
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError
from seer_jax.obs.run_dir import CONFIG_FILE

A = TypeVar("A")

SHORT_FORMS = {
    "--policy": "--rollout.policy",
    "--instances": "--rollout.instances",
    "--runtime": "--rollout.runtime",
    "--speculation": "--speculation.mode",
}

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag without a `--no-` twin."""

Settings = Annotated[RunConfig, tyro.conf.arg(name="")]
"""The whole configuration, as dotted options."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The options that decide the defaults of all others, so they are read first."""

    config: str | None = None
    resume: str | None = None


def parse_job(cls: type[A], argv: Sequence[str], *, prog: str) -> A:
    """Parse the arguments of a verb that runs a configuration.

    Args:
        cls: Frozen dataclass of the verb's options with fields `config: str` and `run: Settings`; its docstring and
            those of its fields are the help text.
        argv: Arguments after the verb.
        prog: How the verb is called, such as `seer-jax train`.

    Returns:
        The options; `run` is the preset, or the configuration of the resumed run, with the overrides in place.

    Raises:
        ConfigError: For anything that the user got wrong.
        SystemExit: With 0 after `--help`.
    """
    argv = [_expand_short_form(argument) for argument in _expand_chaos(argv)]
    values, _ = tyro.cli(_Source, args=argv, add_help=False, return_unknown_args=True, registry=_TEXT)
    source, defaults = decode(_Source, values, base=_Source()), cls()
    if source.resume is not None:
        base = _load_resumed(source.resume, source.config)
    else:
        base = load_config(defaults.config if source.config is None else source.config)
    return parse_options(argv, prog=prog, defaults=replace(defaults, run=base))


def parse_options(argv: Sequence[str], *, prog: str, defaults: A) -> A:
    """Parse the arguments of a verb.

    Args:
        argv: Arguments after the verb.
        prog: How the verb is called.
        defaults: Frozen dataclass that gives the options, their defaults and the help text.

    Returns:
        The options.

    Raises:
        ConfigError: For an unknown argument or a value of the wrong type.
        SystemExit: With 0 after `--help`.
    """
    cls = type(defaults)
    values, unknown = tyro.cli(
        cls,
        prog=prog,
        description=inspect.getdoc(cls),
        args=argv,
        default=defaults,
        return_unknown_args=True,
        registry=_TEXT,
    )
    if unknown:
        raise _unknown_argument(unknown[0], defaults)
    settings = values.pop("run", None)
    options = decode(cls, values, base=defaults)
    if settings is None:
        return options
    # Read on its own, since its options and so its errors have no `run.` before them.
    return replace(options, run=decode(RunConfig, settings, base=defaults.run))


_TEXT = ConstructorRegistry()


@_TEXT.struct_rule
def _collect(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Let tyro collect the options of a dataclass in a mapping."""
    if not is_dataclass(info.type):
        return None
    hints, docs = get_type_hints(info.type, include_extras=True), read_field_docs(info.type)
    default = info.default if is_dataclass(info.default) else info.type()
    options = [
        StructFieldSpec(
            name=field.name, type=hints[field.name], default=getattr(default, field.name), helptext=docs.get(field.name)
        )
        for field in fields(info.type)
    ]
    return StructConstructorSpec(instantiate=dict, fields=tuple(options))


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
    elif info.type == tuple[int, ...]:
        metavar = "INT ..."
    else:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: CommandLineText(" ".join(words)),
        is_instance=lambda value: True,
        str_from_instance=_to_text,
    )


def _to_text(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [str(list(value))]
    return ["null" if value is None else str(value)]


def _load_resumed(run_dir: str, config: str | None) -> RunConfig:
    if config is not None:
        raise ConfigError("resume", f"{run_dir!r} brings its own configuration", "leave out --config")
    file = Path(run_dir).expanduser() / CONFIG_FILE
    if not file.is_file():
        raise ConfigError("resume", f"{run_dir!r} holds no {CONFIG_FILE}", "give the directory of an earlier run")
    return load_config(str(file))


def _expand_chaos(argv: Sequence[str]) -> list[str]:
    """Write `--chaos a=2,b=4x,c` as `--chaos.a 2 --chaos.b 4 --chaos.c`."""
    names, expanded, rest = [field.name for field in fields(ChaosConfig)], [], list(argv)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option != "--chaos":
            expanded.append(option + equals + value)
            continue
        if not equals:
            value = rest.pop(0) if rest else ""
        for fault in value.split(","):
            name, equals, amount = (word.strip() for word in fault.partition("="))
            if name not in names:
                raise ConfigError("chaos", f"no fault {name!r}", did_you_mean(name, names))
            expanded += [f"--chaos.{name}", *([amount.removesuffix("x")] if equals else [])]
    return expanded


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
