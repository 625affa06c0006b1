"""Impossible settings are refused by name, before anything runs."""

import pytest

from seer_jax.config.decode import decode
from seer_jax.config.schema import RunConfig
from seer_jax.config.validate import ABOVE_ZERO, AT_LEAST, validate
from seer_jax.core.errors import CapacityError, ConfigError, SeerError


def with_settings(**settings: object) -> RunConfig:
    """A default configuration with `section__key=value` changed."""
    config = RunConfig()
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        config = decode(RunConfig, {section: {key: value}} if section else {key: value}, base=config)
    return config


def test_the_defaults_are_valid_for_training():
    validate(RunConfig(), training=True)


@pytest.mark.parametrize("path", [*AT_LEAST, *ABOVE_ZERO])
def test_a_number_below_its_bound_is_refused_by_name(path):
    value = AT_LEAST[path] - 1 if path in AT_LEAST else 0
    with pytest.raises(ConfigError) as caught:
        validate(with_settings(**{path.replace(".", "__"): value}), training=False)
    assert caught.value.path == path
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"sampling__top_p": 1.01}, "sampling.top_p"),
        ({"sampling__temperature": float("nan")}, "sampling.temperature"),
        ({"train__learning_rate": float("inf")}, "train.learning_rate"),
        ({"train__clip_low": 1.0}, "train.clip_low"),
        ({"sampling__max_tokens": 1024, "engine__max_model_len": 1024}, "sampling.max_tokens"),
        ({"engine__prefill_tile": 257}, "engine.prefill_tile"),
        ({"sharding__data": 4, "engine__prefill_tile": 65}, "engine.prefill_tile"),
        ({"sharding__data": 3}, "engine.max_num_seqs"),
        ({"sharding__data": 4, "engine__num_pages": 1022}, "engine.num_pages"),
        ({"rollout__min_instances": 3}, "rollout.min_instances"),
        ({"rollout__min_instances": 1, "rollout__runtime": "local"}, "rollout.min_instances"),
        ({"run_dir": ""}, "run_dir"),
        ({"run_dir": "runs/{nme}"}, "run_dir"),
        ({"run_dir": "runs/{"}, "run_dir"),
    ],
)
def test_an_impossible_combination_is_refused_by_name(settings, path):
    with pytest.raises(ConfigError) as caught:
        validate(with_settings(**settings), training=False)
    assert caught.value.path == path
    assert caught.value.hint


def test_one_request_must_fit_in_the_pages_beside_the_reserved_one():
    validate(with_settings(engine__num_pages=65), training=False)
    with pytest.raises(CapacityError, match=r"engine\.num_pages: is 64.*needs 64 pages, only 63 exist.*at least 65"):
        validate(with_settings(engine__num_pages=64), training=False)


def test_one_request_must_fit_in_the_pages_of_a_rank():
    validate(with_settings(sharding__data=2, engine__num_pages=130), training=False)
    with pytest.raises(CapacityError, match=r"is 128 / sharding\.data=2.*needs 64 pages, only 63 exist.*at least 130"):
        validate(with_settings(sharding__data=2, engine__num_pages=128), training=False)


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"sampling__top_p": 0.9}, "sampling.top_p"),
        ({"sampling__top_k": 5}, "sampling.top_k"),
        ({"sampling__temperature": 0}, "sampling.temperature"),
        ({"rollout__group_size": 1}, "rollout.group_size"),
        ({"data__heldout_prompts": 0}, "data.heldout_prompts"),
        ({"train__num_minibatches": 129}, "train.num_minibatches"),
        ({"train__replay_routing": True}, "train.replay_routing"),
        ({"train__tokens_per_microbatch": 1023}, "train.tokens_per_microbatch"),
    ],
)
def test_what_only_training_forbids_is_allowed_in_a_rollout(settings, path):
    config = with_settings(**settings)
    validate(config, training=False)
    with pytest.raises(SeerError, match=f"^{path}: "):
        validate(config, training=True)
