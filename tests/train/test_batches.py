"""Claims about microbatches."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_jax.core.types import RequestId, Sample
from seer_jax.train.batches import list_length_buckets, make_microbatches


def make_sample(index: int, num_prompt: int, num_tokens: int) -> Sample:
    return Sample(
        request_id=RequestId(0, index),
        prompt_token_ids=np.arange(1, num_prompt + 1, dtype=np.int32),
        token_ids=np.arange(101, num_tokens + 101, dtype=np.int32),
        logprobs=-np.arange(1, num_tokens + 1, dtype=np.float32) - 1000 * index,
        finish_reason="stop",
        policy_version=0,
        num_chunks=1,
    )


@given(max_length=st.integers(1, 5000))
def test_buckets_ascend_by_about_two_and_hold_the_longest(max_length):
    buckets = list_length_buckets(max_length)
    assert buckets[-1] == max_length
    assert all(b % 16 == 0 for b in buckets[:-1])
    assert all(low < high <= 2 * low for low, high in itertools.pairwise(buckets))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 300)), min_size=1, max_size=80),
    row_multiple=st.sampled_from([1, 2, 4]),
)
def test_every_sample_is_in_exactly_one_row_with_its_own_numbers(lengths, row_multiple):
    samples = [make_sample(i, p, n) for i, (p, n) in enumerate(lengths)]
    tags = np.arange(1, len(samples) + 1, dtype=np.float32)
    batches = make_microbatches(
        samples, tags, -tags, max_length=360, tokens_per_microbatch=1600, row_multiple=row_multiple
    )
    seen = []
    for batch in batches:
        assert batch.token_ids.size <= 1600 and len(batch.token_ids) % row_multiple == 0
        for row in range(len(batch.token_ids)):
            if not batch.mask[row].any():
                assert batch.row_weights[row] == batch.advantages[row] == 0
                continue
            index = int(batch.advantages[row]) - 1
            sample = samples[index]
            seen.append(index)
            assert batch.row_weights[row] == -tags[index]
            text = np.concatenate([sample.prompt_token_ids, sample.token_ids])
            np.testing.assert_array_equal(batch.token_ids[row, : len(text)], text)
            assert not batch.token_ids[row, len(text) :].any()
            predicted = np.roll(batch.token_ids[row], -1)[batch.mask[row]]
            np.testing.assert_array_equal(predicted, sample.token_ids)
            np.testing.assert_array_equal(batch.old_logprobs[row][batch.mask[row]], sample.logprobs)
            assert not batch.old_logprobs[row][~batch.mask[row]].any()
    assert sorted(seen) == list(range(len(samples)))
    assert len({b.token_ids.shape for b in batches}) <= len(list_length_buckets(360))


def test_replayed_experts_stand_at_the_token_that_chose_them():
    samples = [
        dataclasses.replace(make_sample(i, p, n), expert_ids=np.arange(n * 6, dtype=np.int16).reshape(n, 2, 3))
        for i, (p, n) in enumerate([(5, 7), (1, 60), (12, 1)])
    ]
    ones = np.ones(3, np.float32)
    sizes = {"max_length": 128, "tokens_per_microbatch": 256}
    assert all(b.expert_ids is None for b in make_microbatches(samples, ones, ones, **sizes))
    [batch] = make_microbatches(samples, ones, ones, expert_ids_shape=(2, 3), **sizes)
    assert batch.expert_ids.dtype == np.int16 and batch.expert_ids.shape == (*batch.token_ids.shape, 2, 3)
    for row, sample in enumerate(sorted(samples, key=lambda s: -len(s.prompt_token_ids) - len(s.token_ids))):
        np.testing.assert_array_equal(batch.expert_ids[row][batch.mask[row]], sample.expert_ids)
    assert (batch.expert_ids[~batch.mask] == -1).all()


def test_only_the_last_microbatch_has_empty_rows():
    rng = np.random.default_rng(0)
    samples = [make_sample(i, 20, int(n)) for i, n in enumerate(rng.integers(1, 330, 100))]
    ones = np.ones(100, np.float32)
    batches = make_microbatches(samples, ones, ones, max_length=350, tokens_per_microbatch=2048)
    assert all(batch.mask.any(axis=1).all() for batch in batches[:-1])
