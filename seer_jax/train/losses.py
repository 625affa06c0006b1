"""Policy-gradient objectives as pure functions of log-probabilities.

Every objective is a plain sum over rows: `sum_i row_weights[i] * (sum over the tokens of response i)`. All
denominators sit in `row_weights`, which is computed from the whole minibatch before any of it is run, so the sum over
microbatches is the minibatch's loss and accumulated gradients are its gradient, however the rows are cut.

Every function returns `(loss_sum, metrics)`. Metrics are sums over tokens too, except names that end in `_max`; see
`merge_metrics`.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from seer_jax.train.advantages import LossName

AnyArray = Array | np.ndarray
Metrics = dict[str, Float[Array, ""]]

MAX_LOG_RATIO = 20.0
"""exp() beyond this overflows soon, and an infinite ratio times a zero gradient is NaN."""


def compute_row_weights(
    loss: LossName, num_tokens: Integer[np.ndarray, " N"], weights: Float[np.ndarray, " N"], max_tokens: int
) -> Float[np.ndarray, " N"]:
    """Compute the factor of every response's token sum, all denominators included.

    With n responses of non-zero weight (G per prompt, times the prompts of the minibatch):

    * `grpo`: 1 / (n * len_i), the mean over responses of the mean over tokens.
    * `dr_grpo`: 1 / (n * max_tokens), a constant, so that a long wrong answer is not punished less per token.
    * `k15`: 1 / n, the objective is per sequence.

    Args:
        loss: The objective.
        num_tokens: Response length of every sample of the minibatch, in tokens.
        weights: 1 for samples that count, 0 for those that do not.
        max_tokens: Generation limit, in tokens.

    Returns:
        float32 [N].
    """
    per_response = {"grpo": num_tokens, "dr_grpo": max_tokens, "k15": 1}[loss]
    return (weights / (max(weights.sum(), 1) * np.maximum(per_response, 1))).astype(np.float32)


def clipped_loss(
    logprobs: Float[AnyArray, "B L"],
    old_logprobs: Float[AnyArray, "B L"],
    mask: Bool[AnyArray, "B L"],
    advantages: Float[AnyArray, " B"],
    row_weights: Float[AnyArray, " B"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum GRPO's token-level clipped objective: -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = pi / pi_rollout.

    DeepSeekMath eq. 3 without its KL term (see `kl_loss`); `grpo` and `dr_grpo` differ in advantages and row weights
    only. The old policy is the rollout's own record, so on the first minibatch rho is 1 up to numerics and the gradient
    is -A grad log pi.

    Args:
        logprobs: Learner's log-probability of every token.
        old_logprobs: Rollout's.
        mask: True at response tokens.
        advantages: Advantage of every row.
        row_weights: From `compute_row_weights`.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.

    Returns:
        Loss sum and metrics `num_clipped`.
    """
    ratio = jnp.exp(_masked_difference(logprobs, old_logprobs, mask))
    advantages = advantages[:, None]
    free, clipped = ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    loss = -jnp.sum(row_weights[:, None] * jnp.where(mask, jnp.minimum(free, clipped), 0.0))
    return loss, {"num_clipped": jnp.sum(mask & (clipped < free), dtype=jnp.float32)}


def squared_loss(
    logprobs: Float[AnyArray, "B L"],
    old_logprobs: Float[AnyArray, "B L"],
    mask: Bool[AnyArray, "B L"],
    advantages: Float[AnyArray, " B"],
    row_weights: Float[AnyArray, " B"],
    *,
    tau: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum Kimi K1.5's objective (A - tau D)^2 / (2 tau), D = sum over tokens of log pi - log pi_rollout.

    K1.5 eq. 2-3 divided by 2 tau, so that on the first on-policy step (D = 0) the gradient is -A grad log pi whatever
    tau is.

    Args:
        logprobs: Learner's log-probability of every token.
        old_logprobs: Rollout's.
        mask: True at response tokens.
        advantages: Reward minus group mean of every row.
        row_weights: From `compute_row_weights`.
        tau: Temperature of the objective; large tau keeps the policy near the rollout's.

    Returns:
        Loss sum and metrics `sequence_gap_max` (the largest |D|).
    """
    difference = jnp.sum(jnp.where(mask, logprobs - old_logprobs, 0.0), axis=1)
    loss = jnp.sum(row_weights * (advantages - tau * difference) ** 2) / (2 * tau)
    return loss, {"sequence_gap_max": jnp.max(jnp.abs(difference))}


def kl_loss(
    logprobs: Float[AnyArray, "B L"],
    ref_logprobs: Float[AnyArray, "B L"],
    mask: Bool[AnyArray, "B L"],
    row_weights: Float[AnyArray, " B"],
    *,
    coef: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum the KL penalty to the reference weights by the k3 estimator exp(d) - d - 1, d = log pi_ref - log pi.

    Args:
        logprobs: Learner's log-probability of every token.
        ref_logprobs: Log-probability of every token under the reference weights.
        mask: True at response tokens.
        row_weights: From `compute_row_weights`; the penalty is averaged as the objective is.
        coef: Weight of the penalty.

    Returns:
        Loss sum and metrics `kl_ref`.
    """
    difference = _masked_difference(ref_logprobs, logprobs, mask)
    k3 = jnp.exp(difference) - difference - 1.0
    return coef * jnp.sum(row_weights[:, None] * k3), {"kl_ref": jnp.sum(k3)}


def compare_with_rollout(
    logprobs: Float[AnyArray, "B L"], old_logprobs: Float[AnyArray, "B L"], mask: Bool[AnyArray, "B L"]
) -> Metrics:
    """Measure how the learner's view of the response tokens differs from the rollout's.

    Args:
        logprobs: Learner's log-probability of every token.
        old_logprobs: Rollout's.
        mask: True at response tokens.

    Returns:
        `num_tokens`, `entropy` (sum of -log pi: unbiased while on-policy), `logprob_gap` (sum of |difference|),
        `logprob_gap_max`, `ratio` and `ratio_max` (pi / pi_rollout), `kl_old` (k3 estimate of KL(rollout || learner)).
    """
    gap = jnp.abs(jnp.where(mask, logprobs - old_logprobs, 0.0))
    log_ratio = _masked_difference(logprobs, old_logprobs, mask)
    ratio = jnp.exp(log_ratio)
    return {
        "num_tokens": jnp.sum(mask, dtype=jnp.float32),
        "entropy": -jnp.sum(jnp.where(mask, logprobs, 0.0)),
        "logprob_gap": jnp.sum(gap),
        "logprob_gap_max": jnp.max(gap),
        "ratio": jnp.sum(jnp.where(mask, ratio, 0.0)),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "kl_old": jnp.sum(ratio - 1.0 - log_ratio),
    }


def merge_metrics(microbatches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Join the metrics of microbatches: maxima for names that end in `_max`, sums for all others."""
    return {
        name: float((max if name.endswith("_max") else sum)(metrics[name] for metrics in microbatches))
        for name in microbatches[0]
    }


def _masked_difference(
    left: Float[AnyArray, "B L"], right: Float[AnyArray, "B L"], mask: Bool[AnyArray, "B L"]
) -> Float[AnyArray, "B L"]:
    # Masked before exp(): padding holds arbitrary values, and inf * 0 would be NaN in the backward pass.
    return jnp.clip(jnp.where(mask, left - right, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
