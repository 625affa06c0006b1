"""Task, settings and model that do not fit together are refused before a run, by name and with a fix."""

import json
from dataclasses import replace

import pytest

from seer_jax.config.schema import DataConfig, EngineConfig, RunConfig, SamplingConfig
from seer_jax.core.errors import ConfigError
from seer_jax.models.config import DecoderConfig
from seer_jax.train.checks import check_task, stop_token_ids
from seer_jax.train.tasks import make_task

BYTE_MODEL = DecoderConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    eos_token_id=(257,),
)
OTHER_MODEL = replace(BYTE_MODEL, vocab_size=500, eos_token_id=(2,))


def limits(max_tokens: int, max_model_len: int) -> RunConfig:
    return RunConfig(sampling=SamplingConfig(max_tokens=max_tokens), engine=EngineConfig(max_model_len=max_model_len))


@pytest.fixture
def jsonl(tmp_path):
    def make(*records):
        file = tmp_path / "prompts.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        return make_task(DataConfig(task="jsonl", path=str(file), reward="math:fsum", heldout_prompts=1))

    return make


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "fix"),
    [(385, 542, "raise it to 543, or lower sampling.max_tokens to 384"), (100, 150, "raise it to 258, or leave out")],
)
def test_the_longest_prompt_must_fit_with_its_response(max_tokens, max_model_len, fix):
    task = make_task(DataConfig())
    with pytest.raises(ConfigError, match=rf"^engine\.max_model_len: is {max_model_len}, .*prompt 158 .*{fix}"):
        check_task(task, limits(max_tokens, max_model_len), BYTE_MODEL)
    check_task(task, limits(max_tokens, 158 + max_tokens), BYTE_MODEL)


def test_expert_ids_are_refused_for_a_model_without_experts():
    task, config = make_task(DataConfig()), RunConfig(engine=EngineConfig(expert_ids=True))
    check_task(task, config, BYTE_MODEL)
    with pytest.raises(ConfigError, match=r"^engine\.expert_ids: the model has none"):
        check_task(task, config, replace(BYTE_MODEL, first_k_dense_replace=2))


@pytest.mark.parametrize("changes", [{"eos_token_id": (2,)}, {"eos_token_id": ()}, {"vocab_size": 258}])
def test_text_is_refused_for_a_model_with_another_tokenizer(changes, jsonl):
    model = replace(BYTE_MODEL, **changes)
    for task, setting in ((make_task(DataConfig()), "data.task"), (jsonl(*[{"prompt": "x"}] * 2), "data.path")):
        check_task(task, RunConfig(), BYTE_MODEL)
        with pytest.raises(ConfigError, match=f"^{setting}: .*another tokenizer.*prompt_token_ids.*response_token_ids"):
            check_task(task, RunConfig(), model)


@pytest.mark.parametrize("place", [0, 2])
def test_a_token_id_outside_the_vocabulary_is_named_with_its_record(place, jsonl):
    records = [{"prompt_token_ids": [1, 499], "prompt": "shown only"}] * 3
    check_task(jsonl(*records), RunConfig(), OTHER_MODEL)
    records[place] = {"prompt_token_ids": [500, 1]}
    with pytest.raises(ConfigError, match=rf"^data\.path: .*record {place + 1} holds token id 500, vocab_size is 500"):
        check_task(jsonl(*records), RunConfig(), OTHER_MODEL)


def test_responses_end_with_the_configured_tokens_else_with_the_models():
    configured = RunConfig(sampling=SamplingConfig(stop_token_ids=(7, 8)))
    assert stop_token_ids(configured, OTHER_MODEL) == (7, 8)
    assert stop_token_ids(RunConfig(), OTHER_MODEL) == (2,)


@pytest.mark.parametrize(
    ("given", "said"),
    [((7, 500), "500 is outside the vocabulary of 500"), ((-1,), "-1 is outside"), ((1, 2, 3, 4, 5), "are 5 tokens")],
)
def test_stop_tokens_that_the_engine_cannot_use_are_refused(given, said):
    config = RunConfig(sampling=SamplingConfig(stop_token_ids=given))
    with pytest.raises(ConfigError, match=rf"^sampling\.stop_token_ids: .*{said}"):
        stop_token_ids(config, OTHER_MODEL)


def test_more_end_tokens_of_a_model_than_the_engine_can_use_are_refused():
    with pytest.raises(
        ConfigError, match=r"sampling\.stop_token_ids: .*5 tokens .*at most 4; if unset, .*eos_token_id"
    ):
        stop_token_ids(RunConfig(), replace(OTHER_MODEL, eos_token_id=(1, 2, 3, 4, 5)))
