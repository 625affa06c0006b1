"""Numbers with their origin, and what they may be; the strict decoding of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from seer_jax.config.decode import read_number
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError

Kind = Literal["physical", "measured", "fitted"]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A number and where it comes from.

    Attributes:
        value: The number, or a list of numbers.
        kind: `physical`: hardware, shape of the model, or a setting that the paper states. `measured`: a measurement,
            the paper's or ours. `fitted`: chosen, such that the figures of one experiment come out, or guessed where
            the paper says nothing; the source tells which.
        source: Where from, or how.
    """

    value: int | float | tuple[int | float, ...]
    kind: Kind
    source: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a constant may be: whole numbers only or not, a list or not, and between which bounds (both included)."""

    low: float = 0.0
    high: float = float("inf")
    is_whole: bool = False
    is_list: bool = False


COUNT = Rule(low=1.0, is_whole=True)
POSITIVE = Rule(low=1e-12)
SHARE = Rule(high=1.0)
CONSTANTS: Mapping[str, Mapping[str, Rule]] = {
    "cluster": {
        "num_instances": COUNT,
        "chips_per_instance": COUNT,
        "ranks_per_instance": COUNT,
        "kv_bytes_per_rank": POSITIVE,
        "page_size": COUNT,
        "max_num_seqs": COUNT,
        "chunk_size": COUNT,
        "transfer_bytes_per_s": POSITIVE,
        "transfer_latency_s": Rule(),
    },
    "requests": {
        "num_requests": COUNT,
        "group_size": COUNT,
        "prompt_tokens": COUNT,
        "mean_length": POSITIVE,
        "limit": COUNT,
        "sigma": POSITIVE,
        "correlation": SHARE,
    },
    "model": {
        "parameters": POSITIVE,
        "active_parameters": POSITIVE,
        "expert_share": SHARE,
        "num_experts": Rule(is_whole=True),
        "experts_per_token": Rule(is_whole=True),
        "bytes_per_parameter": POSITIVE,
        "kv_bytes_per_token": POSITIVE,
        "attention_ops_per_pair": POSITIVE,
        "prefill_attention_ops_per_pair": POSITIVE,
    },
    "times": {
        "memory_efficiency": Rule(low=1e-12, high=1.0),
        "compute_efficiency": Rule(low=1e-12, high=1.0),
        "prefill_efficiency": Rule(low=1e-12, high=1.0),
        "step_overhead_s": Rule(),
        "draft_overhead_s": Rule(),
        "draft_overhead_per_token_s": Rule(),
    },
    "exchange": {
        "layers": Rule(is_whole=True),
        "chips": Rule(low=1.0, is_whole=True, is_list=True),
        "seconds_per_layer": Rule(is_list=True),
    },
    "speculation": {
        "acceptance_references": Rule(is_whole=True, is_list=True),
        "acceptance_lengths": Rule(low=1.0, is_list=True),
        "tree_acceptance_lengths": Rule(low=1.0, is_list=True),
        "tree_nodes": Rule(low=1.0),
        "acceptance_scale": Rule(),
        "gamma_max": COUNT,
        "priority_factor": Rule(low=1.0),
        "vanilla_gamma": COUNT,
        "vanilla_acceptance_length": Rule(low=1.0),
        "vanilla_mean_drafted": Rule(),
        "vanilla_passes": Rule(is_whole=True),
        "vanilla_parameters": Rule(),
        "vanilla_layer_share": SHARE,
        "vanilla_kv_bytes_per_token": Rule(),
        "vanilla_pass_overhead_s": Rule(),
    },
}
"""Names of all constants by section, and what they may be."""


def read_constant(values: Any, rule: Rule, path: str, where: str) -> Constant:
    """Read `{value, kind, source}`; `path` and `where` appear in errors."""
    check_keys(values, {"value", "kind", "source"}, set(), path, where)
    if not isinstance(values["source"], str) or not values["source"].strip():
        raise ConfigError(f"{path}.source", f"expected text, got {values['source']!r}{where}", "say where it is from")
    return Constant(
        value=read_value(values["value"], rule, f"{path}.value", where),
        kind=read_choice(values["kind"], get_args(Kind), f"{path}.kind", where),
        source=values["source"],
    )


def read_value(value: Any, rule: Rule, path: str, where: str) -> int | float | tuple[int | float, ...]:
    """Read a number, or a list of them."""
    if rule.is_list:
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(path, f"expected a list of numbers, got {value!r}{where}", "for example [0, 1]")
        return tuple(read_value(item, replace(rule, is_list=False), path, where) for item in value)
    number = read_number(value)
    if number is None:
        raise ConfigError(path, f"expected a number, got {value!r}{where}", "without quotes or units")
    if rule.is_whole and not number.is_integer():
        raise ConfigError(path, f"expected an integer, got {value!r}{where}", f"for example {round(number)}")
    if not (math.isfinite(number) and rule.low <= number <= rule.high):
        raise ConfigError(path, f"is {value!r}{where}", f"between {rule.low:g} and {rule.high:g}")
    return int(number) if rule.is_whole else number


def read_choice(value: Any, choices: tuple[str, ...], path: str, where: str) -> Any:
    """Read one of several names."""
    if value not in choices:
        raise ConfigError(path, f"{value!r} is not a choice{where}", did_you_mean(str(value), choices))
    return value


def check_keys(values: Any, required: set[str], optional: set[str], path: str, where: str) -> None:
    """Refuse unknown keys, and demand the required ones."""
    if not isinstance(values, Mapping):
        problem = f"expected settings as `key: value`, got {values!r}{where}"
        raise ConfigError(path or "workload", problem, f"needs {', '.join(sorted(required))}")
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in required | optional:
            raise ConfigError(f"{prefix}{key}", f"unknown key{where}", did_you_mean(str(key), required | optional))
    missing = sorted(required - set(values))
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}", f"missing{where}", "every constant is given, with kind and source")
