"""Rewards: right values in the samples' order, and a crash or a hang costs one sample only."""

import signal
import threading
import time

import numpy as np
import pytest

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
    rewards, failures = compute_rewards(ChainSum(), PROMPTS, samples, 60.0)
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
    _, failures = compute_rewards(ChainSum(reward_function=greedy), PROMPTS, samples, 60.0)
    assert failures == ()
    assert [record["response_token_ids"] for record in seen] == [[35, 48, 51, 257], [257]]
    assert all(record["prompt_token_ids"] == PROMPTS[4].token_ids.tolist() for record in seen)
    assert all(record["answer"] == PROMPTS[4].record["answer"] == "03" for record in seen)


def test_a_crash_names_the_sample_and_keeps_the_batch():
    def fragile(prompt, response, record):
        return {"good": 0.5, "bad": float("inf"), "none": None}[response]

    texts = ["good", "unknown", "bad", "none", "good"]
    samples = [sample(4, i, text) for i, text in enumerate(texts)]
    rewards, failures = compute_rewards(ChainSum(reward_function=fragile), PROMPTS, samples, 60.0)
    np.testing.assert_array_equal(rewards, np.float32([0.5, np.nan, np.nan, np.nan, 0.5]))
    assert [f.request_id for f in failures] == [RequestId(4, 1), RequestId(4, 2), RequestId(4, 3)]
    assert "KeyError: 'unknown'" in failures[0].error and "in fragile" in failures[0].error
    assert "returned inf" in failures[1].error
    assert "TypeError" in failures[2].error


def sleep() -> None:
    time.sleep(200)


def spin() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


def test_a_function_that_takes_too_long_is_interrupted_and_keeps_the_batch():
    def lingering(prompt, response, record):
        {"asleep": sleep, "busy": spin}.get(response, int)()
        return 0.5

    texts = ["good", "asleep", "busy", "good"]
    samples = [sample(4, i, text) for i, text in enumerate(texts)]
    before, alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    started = time.monotonic()
    rewards, failures = compute_rewards(ChainSum(reward_function=lingering), PROMPTS, samples, 0.2)
    took_s = time.monotonic() - started
    np.testing.assert_array_equal(rewards, np.float32([0.5, np.nan, np.nan, 0.5]))
    assert [f.request_id for f in failures] == [RequestId(4, 1), RequestId(4, 2)] and 0.4 <= took_s < 20
    assert "longer than train.reward_timeout_s=0.2" in failures[0].error and "in sleep" in failures[0].error
    assert "in spin" in failures[1].error
    # An alarm of somebody else's, such as pytest-timeout's, is as it was.
    after = signal.getitimer(signal.ITIMER_REAL)
    assert signal.getsignal(signal.SIGALRM) is before and after[1] == alarm[1]
    assert after[0] == pytest.approx(max(0.0, alarm[0] - took_s), abs=1.0)


def test_beside_the_main_thread_nothing_is_interrupted():
    def slow(prompt, response, record):
        time.sleep(0.3)
        return 0.5

    judged = []

    def run() -> None:
        judged.append(compute_rewards(ChainSum(reward_function=slow), PROMPTS, [sample(4, 0, "")], 0.1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((rewards, failures),) = judged
    assert rewards.tolist() == [0.5] and failures == ()
