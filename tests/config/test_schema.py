"""The declaration: complete, documented, and readable back from what is written."""

from dataclasses import fields, is_dataclass

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.config.decode import decode, iterate_settings
from seer_jax.config.docs import read_field_docs
from seer_jax.config.dump import to_yaml
from seer_jax.config.schema import RunConfig
from seer_jax.config.validate import ABOVE_ZERO, AT_LEAST


@pytest.mark.parametrize("name", [field.name for field in fields(RunConfig())])
def test_every_setting_has_a_docstring_because_it_is_its_help_text(name):
    section = getattr(RunConfig(), name)
    if is_dataclass(section):
        assert list(read_field_docs(type(section))) == [field.name for field in fields(section)]
    else:
        assert read_field_docs(RunConfig)[name]


def test_every_setting_can_be_read_back_from_the_yaml_that_is_written():
    values = yaml.safe_load(to_yaml(RunConfig()))
    assert decode(RunConfig, values, base=RunConfig()) == RunConfig()


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.none() | st.text(), st.lists(st.integers()))
def test_any_number_text_and_list_survive_writing_and_reading(number, text, optional_text, numbers):
    values = {
        "train": {"learning_rate": number},
        "data": {"task": text, "path": optional_text},
        "sampling": {"stop_token_ids": numbers},
    }
    config = decode(RunConfig, values, base=RunConfig())
    assert decode(RunConfig, yaml.safe_load(to_yaml(config)), base=RunConfig()) == config


def test_every_number_has_a_lower_bound_of_its_own():
    optional = {"speculation.max_verify_tokens", "speculation.verify_tile"}
    bounded = {*AT_LEAST, *ABOVE_ZERO}
    numbers = {
        path
        for path, value in iterate_settings(RunConfig())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert bounded == numbers | optional
