"""Samples to microbatches of a few static shapes.

Each distinct shape costs one compilation, each padded token costs a real token's time. Lengths are therefore rounded
up to a few buckets, each half of the one above, and samples are laid longest first: a bucket's spare rows are filled by
the next shorter samples, so that only the last microbatch has empty rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int16, Int32

from seer_jax.core.types import Sample

MIN_BUCKET = 64
LENGTH_MULTIPLE = 16
"""Lengths of buckets are multiples of this (vector registers, TPU lanes)."""


class Microbatch(NamedTuple):
    """Rows that are run together. Row i is prompt, response, padding; position t holds what is known of token t + 1.

    Attributes:
        token_ids: int32 [B, L]; padding is 0.
        mask: bool [B, L], True where token t + 1 is a response token.
        old_logprobs: float32 [B, L], rollout's log-probability of token t + 1; 0 off the mask.
        advantages: float32 [B].
        row_weights: float32 [B], see `losses.compute_row_weights`; 0 in empty rows.
        expert_ids: int16 [B, L, MoE layers, experts per token], the rollout's choice for token t itself; -1 where
            unknown. None unless replayed.
    """

    token_ids: Int32[np.ndarray, "B L"]
    mask: Bool[np.ndarray, "B L"]
    old_logprobs: Float[np.ndarray, "B L"]
    advantages: Float[np.ndarray, " B"]
    row_weights: Float[np.ndarray, " B"]
    expert_ids: Int16[np.ndarray, "B L moe_layers K"] | None = None


def list_length_buckets(max_length: int) -> tuple[int, ...]:
    """List the padded lengths, ascending: `max_length` and its halves down to about 64 tokens.

    Args:
        max_length: Longest prompt plus response, in tokens.

    Returns:
        All but the last are multiples of 16 tokens.
    """
    buckets = [max_length]
    while (half := -(-buckets[-1] // (2 * LENGTH_MULTIPLE)) * LENGTH_MULTIPLE) >= MIN_BUCKET:
        buckets.append(half)
    return tuple(reversed(buckets))


def make_microbatches(
    samples: Sequence[Sample],
    advantages: Float[np.ndarray, " N"],
    row_weights: Float[np.ndarray, " N"],
    *,
    max_length: int,
    tokens_per_microbatch: int,
    row_multiple: int = 1,
    expert_ids_shape: tuple[int, int] | None = None,
) -> list[Microbatch]:
    """Cut samples into microbatches, longest first.

    Args:
        samples: In any order.
        advantages: Of every sample.
        row_weights: Of every sample.
        max_length: Longest prompt plus response that can occur, in tokens; fixes the buckets.
        tokens_per_microbatch: rows x padded length stays within it; at least max_length x row_multiple.
        row_multiple: The number of rows is a multiple of this (devices that share the rows).
        expert_ids_shape: MoE layers and experts per token of the samples' expert ids, to replay them; None leaves them.

    Returns:
        Microbatches; the number of rows depends on the padded length only.

    Invariants: every sample is in exactly one row; at most `len(list_length_buckets(max_length))` distinct shapes.
    """
    buckets = list_length_buckets(max_length)
    lengths = np.array([len(s.prompt_token_ids) + len(s.token_ids) for s in samples])
    order = np.argsort(-lengths, kind="stable")
    microbatches = []
    while len(order):
        bucket = buckets[np.searchsorted(buckets, lengths[order[0]])]
        num_rows = tokens_per_microbatch // bucket // row_multiple * row_multiple
        assert num_rows > 0
        rows, order = order[:num_rows], order[num_rows:]
        batch = _fill([samples[i] for i in rows], advantages[rows], row_weights[rows], num_rows, bucket)
        if expert_ids_shape is not None:
            batch = _fill_experts(batch, [samples[i] for i in rows], expert_ids_shape)
        microbatches.append(batch)
    return microbatches


def _fill(
    samples: list[Sample], advantages: np.ndarray, row_weights: np.ndarray, num_rows: int, length: int
) -> Microbatch:
    batch = Microbatch(
        token_ids=np.zeros((num_rows, length), np.int32),
        mask=np.zeros((num_rows, length), bool),
        old_logprobs=np.zeros((num_rows, length), np.float32),
        advantages=np.zeros(num_rows, np.float32),
        row_weights=np.zeros(num_rows, np.float32),
    )
    for row, sample in enumerate(samples):
        start = len(sample.prompt_token_ids)
        end = start + len(sample.token_ids)
        batch.token_ids[row, :start] = sample.prompt_token_ids
        batch.token_ids[row, start:end] = sample.token_ids
        batch.mask[row, start - 1 : end - 1] = True
        batch.old_logprobs[row, start - 1 : end - 1] = sample.logprobs
    batch.advantages[: len(samples)] = advantages
    batch.row_weights[: len(samples)] = row_weights
    return batch


def _fill_experts(batch: Microbatch, samples: list[Sample], shape: tuple[int, int]) -> Microbatch:
    expert_ids = np.full((*batch.token_ids.shape, *shape), -1, np.int16)
    for row, sample in enumerate(samples):
        start = len(sample.prompt_token_ids) - 1
        expert_ids[row, start : start + len(sample.token_ids)] = sample.expert_ids
    return batch._replace(expert_ids=expert_ids)
