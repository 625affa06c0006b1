"""Strict decoding of plain values (YAML, command line) into the frozen dataclasses of `schema`.

Nothing is ignored and nothing is guessed: an unknown key or a value of another type is an error that names its path.
"""

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError

T = TypeVar("T")

_NUMBER_THAT_YAML_READS_AS_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""YAML 1.1, and so PyYAML, wants `1.0e-4`; everybody writes `1e-4`."""

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    tuple[int, ...]: "a list of integers",
}


class CommandLineText(str):
    """A value as typed on the command line; takes whatever type its field has."""


def decode(cls: type[T], values: Any, *, base: T, source: str = "", path: str = "") -> T:
    """Lay plain values over a configuration.

    Args:
        cls: A dataclass of `schema`.
        values: Mapping from field names to plain values; sections are nested mappings.
        base: Gives the fields that `values` leaves out.
        source: Where the values come from, such as a file name; appears in errors.
        path: Dotted path of this section; appears in errors.

    Returns:
        `base` with the values in place.

    Raises:
        ConfigError: For an unknown key, or a value of the wrong type.
    """
    where = f" in {source}" if source else ""
    if not isinstance(values, Mapping):
        problem = f"expected settings as `key: value`, got {values!r}{where}"
        raise ConfigError(path or "config", problem, "remove the section or indent its settings below it")
    hints = get_type_hints(cls)
    decoded: dict[str, Any] = {}
    for key, value in values.items():
        key_path = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(key_path, f"unknown key{where}", _suggest_key(str(key), path, base))
        old = getattr(base, key)
        if is_dataclass(old):
            decoded[key] = decode(type(old), value, base=old, source=source, path=key_path)
        else:
            decoded[key] = _decode_value(hints[key], value, old, key_path, where)
    return replace(base, **decoded)


def iterate_settings(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give the dotted path and the value of every setting, in the order of the declaration."""
    for field in fields(config):
        value, field_path = getattr(config, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            yield from iterate_settings(value, f"{field_path}.")
        else:
            yield field_path, value


def read_number(value: Any) -> float | None:
    """Read what YAML made of a number; None if it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_text = isinstance(value, str) and _NUMBER_THAT_YAML_READS_AS_TEXT.fullmatch(value)
    return float(value) if is_number or is_text else None


def _decode_value(hint: Any, value: Any, old: Any, path: str, where: str) -> Any:
    """Check one value against the type of its field; an integer may stand for a float."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, CommandLineText):
        value = _read_text(value, alternatives)
    for alternative in alternatives:
        if get_origin(alternative) is Literal:
            if isinstance(value, str) and value in get_args(alternative):
                return value
        elif alternative is float:
            number = read_number(value)
            if number is not None:
                return number
        elif alternative == tuple[int, ...]:
            if isinstance(value, list | tuple) and all(type(item) is int for item in value):
                return tuple(value)
        elif type(value) is alternative:
            return value
    if get_origin(hint) is Literal:
        raise ConfigError(path, f"{value!r} is not a choice{where}", did_you_mean(str(value), get_args(hint)))
    expected = " or ".join(_TYPE_NAMES[alternative] for alternative in alternatives)
    fix = "put it in quotes" if str in alternatives else f"for example {yaml.safe_dump(old).splitlines()[0]}"
    raise ConfigError(path, f"expected {expected}, got {value!r}{where}", fix)


def _read_text(text: str, alternatives: tuple[Any, ...]) -> Any:
    """Read what was typed as YAML would, except that a text field takes it as it stands.

    A list needs no brackets.
    """
    if types.NoneType in alternatives and text in ("null", "None"):
        return None
    if str in alternatives or any(get_origin(alternative) is Literal for alternative in alternatives):
        return str(text)
    if tuple[int, ...] in alternatives and not text.startswith("["):
        text = f"[{', '.join(text.replace(',', ' ').split())}]"
    if not text:
        return ""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return str(text)


def _suggest_key(key: str, section: str, base: Any) -> str:
    """Suggest a sibling that is spelt alike, else the section where a setting of that name lives."""
    siblings = [field.name for field in fields(base)]
    hint = did_you_mean(key, siblings)
    if section or hint.startswith("did you mean"):
        return hint
    elsewhere = [path for path, _ in iterate_settings(base) if path.rpartition(".")[2] == key]
    return f"did you mean {elsewhere[0]}?" if elsewhere else hint
