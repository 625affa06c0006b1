"""Claims about the objectives, against plain numpy restatements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.train import losses

B, L, MAX_TOKENS = 5, 9, 16
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    num_tokens = np.array([9, 1, 4, 6, 0])
    mask = np.arange(L) < num_tokens[:, None]
    logprobs = -rng.exponential(1.0, (B, L)).astype(np.float32)
    old = np.where(mask, logprobs + rng.normal(0, 0.3, (B, L)), 0).astype(np.float32)
    ref = np.where(mask, logprobs + rng.normal(0, 0.3, (B, L)), 0).astype(np.float32)
    advantages = np.array([1.5, -1.0, 0.7, -0.2, 0.0], np.float32)
    weights = np.array([1.0, 1.0, 0.0, 1.0, 0.0], np.float32)
    return logprobs, old, ref, mask, advantages, num_tokens, weights


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_clipped_loss_equals_the_formula_token_by_token(case, loss):
    logprobs, old, _, mask, advantages, num_tokens, weights = case
    row_weights = losses.compute_row_weights(loss, num_tokens, weights, MAX_TOKENS)
    total, num_clipped = 0.0, 0
    for i in range(B):
        for t in range(num_tokens[i]):
            ratio = np.exp(np.float64(logprobs[i, t]) - old[i, t])
            free, clipped = ratio * advantages[i], np.clip(ratio, 0.8, 1.3) * advantages[i]
            denominator = weights.sum() * (num_tokens[i] if loss == "grpo" else MAX_TOKENS)
            total -= weights[i] * min(free, clipped) / denominator
            num_clipped += clipped < free
    value, metrics = losses.clipped_loss(logprobs, old, mask, advantages, row_weights, **CLIP)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert metrics["num_clipped"] == num_clipped > 0


def test_squared_loss_equals_the_formula_per_sequence(case):
    logprobs, old, _, mask, advantages, num_tokens, weights = case
    row_weights = losses.compute_row_weights("k15", num_tokens, weights, MAX_TOKENS)
    difference = [float(np.sum((logprobs - old)[i, : num_tokens[i]], dtype=np.float64)) for i in range(B)]
    expected = sum(weights[i] / weights.sum() * (advantages[i] - 0.5 * difference[i]) ** 2 for i in range(B)) / (
        2 * 0.5
    )
    value, metrics = losses.squared_loss(logprobs, old, mask, advantages, row_weights, tau=0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["sequence_gap_max"], np.abs(difference).max(), rtol=1e-5)


def test_kl_loss_is_k3_and_zero_only_where_the_policies_agree(case):
    logprobs, _, ref, mask, _, num_tokens, weights = case
    row_weights = losses.compute_row_weights("grpo", num_tokens, weights, MAX_TOKENS)
    d = np.where(mask, ref - logprobs, 0).astype(np.float64)
    value, _ = losses.kl_loss(logprobs, ref, mask, row_weights, coef=0.1)
    np.testing.assert_allclose(value, 0.1 * np.sum(row_weights[:, None] * (np.exp(d) - d - 1)), rtol=1e-4)
    assert losses.kl_loss(logprobs, logprobs, mask, row_weights, coef=0.1)[0] == 0.0 < value


@pytest.mark.parametrize("tau", [0.3, 2.0])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "k15"])
def test_the_first_on_policy_gradient_is_minus_advantage_times_grad_log_pi(case, loss, tau):
    logprobs, _, _, mask, advantages, num_tokens, weights = case
    row_weights = losses.compute_row_weights(loss, num_tokens, weights, MAX_TOKENS)

    def objective(x):
        if loss == "k15":
            return losses.squared_loss(x, logprobs, mask, advantages, row_weights, tau=tau)[0]
        return losses.clipped_loss(x, logprobs, mask, advantages, row_weights, **CLIP)[0]

    expected = -(row_weights * advantages)[:, None] * mask
    np.testing.assert_allclose(jax.grad(objective)(jnp.asarray(logprobs)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "k15"])
def test_rows_of_weight_zero_change_neither_the_loss_nor_any_denominator(case, loss):
    *_, num_tokens, weights = case
    kept = weights > 0
    row_weights = losses.compute_row_weights(loss, num_tokens, weights, MAX_TOKENS)
    alone = losses.compute_row_weights(loss, num_tokens[kept], weights[kept], MAX_TOKENS)
    np.testing.assert_array_equal(row_weights[kept], alone)
    assert not row_weights[~kept].any()


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "k15"])
def test_gradients_of_any_cut_into_microbatches_add_up_to_the_whole(case, loss):
    _, old, ref, mask, advantages, num_tokens, weights = case
    row_weights = losses.compute_row_weights(loss, num_tokens, weights, MAX_TOKENS)
    tokens = np.random.default_rng(1).integers(0, 6, (B, L + 1))

    def objective(bigrams, rows):
        logprobs = jax.nn.log_softmax(bigrams)[tokens[rows, :-1], tokens[rows, 1:]]
        arguments = (logprobs, old[rows], mask[rows], advantages[rows], row_weights[rows])
        total = losses.kl_loss(logprobs, ref[rows], mask[rows], row_weights[rows], coef=0.2)[0]
        if loss == "k15":
            return total + losses.squared_loss(*arguments, tau=0.5)[0]
        return total + losses.clipped_loss(*arguments, **CLIP)[0]

    gradient = jax.value_and_grad(objective)
    bigrams = jnp.asarray(np.random.default_rng(2).normal(size=(6, 6)), jnp.float32)
    whole = gradient(bigrams, np.arange(B))
    for cut in ([[0, 1, 2, 3], [4]], [[4, 2], [0], [3, 1]], [[i] for i in range(B)]):
        parts = [gradient(bigrams, np.array(rows)) for rows in cut]
        np.testing.assert_allclose(sum(value for value, _ in parts), whole[0], rtol=1e-5)
        np.testing.assert_allclose(sum(grad for _, grad in parts), whole[1], rtol=1e-4, atol=1e-6)


def test_no_sample_of_weight_gives_finite_zero_weights():
    assert losses.compute_row_weights("grpo", np.array([3, 0]), np.zeros(2, np.float32), 4).tolist() == [0.0, 0.0]


def test_an_absurd_ratio_and_garbage_in_padding_leave_the_gradient_finite(case):
    logprobs, old, _, mask, advantages, num_tokens, weights = case
    row_weights = losses.compute_row_weights("grpo", num_tokens, weights, MAX_TOKENS)
    old = np.where(mask, old, -1e30).astype(np.float32)
    old[0, 0] = -500.0

    def objective(x):
        clipped = losses.clipped_loss(x, old, mask, advantages, row_weights, **CLIP)[0]
        return clipped + losses.kl_loss(x, old, mask, row_weights, coef=0.1)[0]

    assert np.isfinite(jax.grad(objective)(jnp.asarray(logprobs))).all()


def test_rollout_comparison_counts_response_tokens_only(case):
    logprobs, old, _, mask, *_ = case
    metrics = losses.compare_with_rollout(logprobs, old, mask)
    gap = np.abs(logprobs - old)[mask]
    assert metrics["num_tokens"] == mask.sum() == 20
    np.testing.assert_allclose(metrics["logprob_gap"] / 20, gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logprob_gap_max"], gap.max(), rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], -logprobs[mask].sum(), rtol=1e-5)
    assert metrics["kl_old"] > 0


def test_merging_adds_sums_and_keeps_maxima():
    left, right = {"ratio": 1.0, "ratio_max": 5.0}, {"ratio": 2.0, "ratio_max": 3.0}
    assert losses.merge_metrics([left, right]) == {"ratio": 3.0, "ratio_max": 5.0}
