"""Strict decoding: what is accepted, and what the errors say."""

import pytest

from seer_jax.config.decode import CommandLineText, decode, iterate_settings
from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError

BASE = RunConfig()


def decode_run(values: object, source: str = "") -> RunConfig:
    return decode(RunConfig, values, base=BASE, source=source)


def test_given_settings_change_and_all_others_stay():
    config = decode_run({"seed": 3, "rollout": {"chunk_size": 32, "runtime": "local"}})
    assert (config.seed, config.rollout.chunk_size, config.rollout.runtime) == (3, 32, "local")
    changed = dict(iterate_settings(config)).items() - dict(iterate_settings(BASE)).items()
    assert {path for path, _ in changed} == {"seed", "rollout.chunk_size", "rollout.runtime"}


@pytest.mark.parametrize(
    ("values", "path", "hint"),
    [
        ({"rollout": {"chunk_sze": 1}}, "rollout.chunk_sze", "did you mean chunk_size?"),
        ({"rolout": {}}, "rolout", "did you mean rollout?"),
        ({"num_pages": 8}, "num_pages", "did you mean engine.num_pages?"),
        ({"sharding": {"xyz": 8}}, "sharding.xyz", "one of data, expert, tensor"),
        ({3: 8}, "3", "one of"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_what_was_meant(values, path, hint):
    with pytest.raises(ConfigError, match=r"unknown key in run\.yaml") as caught:
        decode_run(values, source="run.yaml")
    assert caught.value.path == path
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("rollout", "chunk_size", "32", "expected an integer, got '32'"),
        ("rollout", "chunk_size", 32.0, "expected an integer, got 32.0"),
        ("rollout", "chunk_size", True, "expected an integer, got True"),
        ("rollout", "chunk_size", None, "expected an integer, got None"),
        ("sampling", "temperature", True, "expected a number, got True"),
        ("sampling", "temperature", "1", "expected a number, got '1'"),
        ("engine", "deterministic", 1, "expected true or false, got 1"),
        ("data", "task", 7, "expected text, got 7"),
        ("data", "path", 7, "expected text or null, got 7"),
        ("rollout", "policy", "ser", "'ser' is not a choice (did you mean seer?)"),
        ("model", "dtype", "int8", "'int8' is not a choice (one of bfloat16, float32)"),
        ("model", "dtype", 8, "8 is not a choice"),
        ("engine", "kv_dtype", "float8", "'float8' is not a choice (did you mean float8_e4m3fn?)"),
        ("sampling", "stop_token_ids", 8, "expected a list of integers, got 8"),
        ("sampling", "stop_token_ids", [1, True], "expected a list of integers, got [1, True]"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_expected(section, key, value, message):
    with pytest.raises(ConfigError) as caught:
        decode_run({section: {key: value}})
    assert caught.value.path == f"{section}.{key}"
    assert message in str(caught.value)


@pytest.mark.parametrize("section", [None, 3, [1], "text"])
def test_a_section_that_is_no_mapping_is_an_error(section):
    with pytest.raises(ConfigError, match=r"^rollout: expected settings"):
        decode_run({"rollout": section})


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), (0.5, 0.5), ("1e-4", 1e-4), ("-2.5E+3", -2500.0), (".5e1", 5.0)]
)
def test_a_float_may_be_written_as_integer_or_in_the_exponent_form_that_yaml_reads_as_text(value, number):
    decoded = decode_run({"train": {"learning_rate": value}}).train.learning_rate
    assert decoded == number
    assert type(decoded) is float


@pytest.mark.parametrize(
    ("section", "key", "text", "value"),
    [
        ("rollout", "chunk_size", "32", 32),
        ("train", "learning_rate", "1e-4", 1e-4),
        ("train", "learning_rate", "1", 1.0),
        ("data", "task", "7", "7"),
        ("data", "path", "null", None),
        ("data", "path", "None", None),
        ("data", "path", "x.jsonl", "x.jsonl"),
        ("rollout", "policy", "seer", "seer"),
        ("sampling", "stop_token_ids", "7", (7,)),
        ("sampling", "stop_token_ids", "7 8", (7, 8)),
        ("sampling", "stop_token_ids", "7,8", (7, 8)),
        ("sampling", "stop_token_ids", "[7, 8]", (7, 8)),
        ("sampling", "stop_token_ids", "", ()),
    ],
)
def test_text_of_the_command_line_takes_the_type_of_its_field(section, key, text, value):
    decoded = getattr(getattr(decode_run({section: {key: CommandLineText(text)}}), section), key)
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize("text", ["", "x", "[1", "1.5", "32 64", "null"])
def test_text_that_is_no_integer_is_not_taken_for_one(text):
    with pytest.raises(ConfigError, match=r"rollout\.chunk_size: expected an integer"):
        decode_run({"rollout": {"chunk_size": CommandLineText(text)}})
