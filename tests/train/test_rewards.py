"""Rewards: right values in the samples' order, and a crash costs one sample only."""

import numpy as np

from seer_jax.core.types import RequestId, Sample
from seer_jax.train.rewards import compute_rewards
from seer_jax.train.tasks.chain_sum import ChainSum, make_prompt
from seer_jax.train.tokenizer import encode

PROMPTS = {4: make_prompt([1, 2]), 7: make_prompt([9, -9])}


def sample(group_id, index, text):
    return Sample(
        request_id=RequestId(group_id, index),
        prompt_token_ids=PROMPTS[group_id].token_ids,
        token_ids=encode(text, add_eos=True),
        logprobs=np.zeros(len(text) + 1, np.float32),
        finish_reason="stop",
        policy_version=0,
        num_chunks=1,
    )


def test_each_sample_is_judged_against_its_own_group_s_prompt():
    samples = [sample(7, 0, "#00"), sample(4, 1, "#03"), sample(4, 0, "#00"), sample(7, 1, "nothing")]
    rewards, failures = compute_rewards(ChainSum(), PROMPTS, samples)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert failures == ()


def test_the_record_holds_the_tokens_for_a_tokenizer_of_the_users_and_is_the_functions_own():
    seen = []

    def greedy(prompt, response, record):
        seen.append(dict(record))
        record.clear()
        return 1.0

    samples = [sample(4, 0, "#03"), sample(4, 1, "")]
    _, failures = compute_rewards(ChainSum(reward_function=greedy), PROMPTS, samples)
    assert failures == ()
    assert [record["response_token_ids"] for record in seen] == [[35, 48, 51, 257], [257]]
    assert all(record["prompt_token_ids"] == PROMPTS[4].token_ids.tolist() for record in seen)
    assert all(record["answer"] == PROMPTS[4].record["answer"] == "03" for record in seen)


def test_a_crash_names_the_sample_and_keeps_the_batch():
    def fragile(prompt, response, record):
        return {"good": 0.5, "bad": float("inf"), "none": None}[response]

    texts = ["good", "unknown", "bad", "none", "good"]
    samples = [sample(4, i, text) for i, text in enumerate(texts)]
    rewards, failures = compute_rewards(ChainSum(reward_function=fragile), PROMPTS, samples)
    np.testing.assert_array_equal(rewards, np.float32([0.5, np.nan, np.nan, np.nan, 0.5]))
    assert [f.request_id for f in failures] == [RequestId(4, 1), RequestId(4, 2), RequestId(4, 3)]
    assert "KeyError: 'unknown'" in failures[0].error and "in fragile" in failures[0].error
    assert "returned inf" in failures[1].error
    assert "TypeError" in failures[2].error
