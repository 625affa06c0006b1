"""A step plan as one int32 array of bucketed shape: one transfer to the device.

Layout: `[num_steps] + requests[num_requests, NUM_FIELDS + num_pages] + tokens[num_tokens, TOKEN_FIELDS] +
last_tokens[num_requests]`. The query tokens are those of decode rows, one each, then those of tiles of `tile` tokens of
one request that attend together.

A request's tokens are a *run*: a slice of its known tokens, or its newest token with a tree of drafts below it. Each
token has its place in the run (`OFFSET`, also that of its KV), its depth (the position, which drafts on different
branches share), and what it sees: the slots below `LIMIT` and those of its ancestors in the tree (`MASK`).
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from seer_jax.core.draft.speculate import DraftBatch
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.step_plan import StepPlan
from seer_jax.core.step_shapes import StepShape
from seer_jax.core.types import MAX_STOP_TOKENS

FIRST_POSITION, REMAINING, KEY_LOW, KEY_HIGH, TOP_K, TEMPERATURE, TOP_P, STOP_IDS = range(8)
NUM_FIELDS = STOP_IDS + MAX_STOP_TOKENS
"""Columns of a request before its block table; floats are stored as their bits."""
TOKEN, REQUEST, OFFSET, DEPTH, LIMIT, MASK, PARENT, COLUMN = range(8)
TOKEN_FIELDS = 8
"""Columns of a token. `OFFSET`, `DEPTH` and `LIMIT` count from the request's first position, `LIMIT` 0 is padding;
`PARENT` is the index of the token before it among all tokens, -1 unless that drew it; `COLUMN` is how many tokens the
step emits before the one drawn after this token, -1 if none is drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Query tokens of one request in one step.

    Attributes:
        sequence: The request.
        start: Position of the first token.
        token_ids: int32 [count]; the last of them, if `samples`, or every one, if drafts, has a token drawn after it.
        samples: Whether the newest known token is among them.
        parents: int32 [drafts] if all but the first are drafts: the draft before each, -1 = the newest token.
    """

    sequence: Sequence
    start: int
    token_ids: np.ndarray
    samples: bool
    parents: np.ndarray | None = None


def packed_size(shape: StepShape) -> int:
    """Elements of the packed array."""
    return 1 + shape.num_requests * (NUM_FIELDS + shape.num_pages + 1) + shape.num_tokens * TOKEN_FIELDS


def plan_runs(plan: StepPlan) -> tuple[list[Run], list[Run]]:
    """Runs of one token and of prompt slices."""
    decodes = [_slice(s, s.num_tokens - 1, s.num_tokens, samples=True) for s in plan.decodes]
    return decodes, [_slice(p.sequence, p.start, p.start + p.count, samples=p.is_last) for p in plan.prefills]


def draft_runs(sequences: SequenceOf[Sequence], batch: DraftBatch, num_nodes: np.ndarray) -> list[Run]:
    """Runs that verify drafts: the newest token, and below it the first `num_nodes` [B] of each row of the batch."""
    runs = []
    for i, sequence in enumerate(sequences):
        start, count = sequence.num_tokens - 1, num_nodes[i]
        token_ids = np.empty(1 + count, np.int32)
        token_ids[0], token_ids[1:] = sequence.token_ids[start], batch.token_ids[i, :count]
        runs.append(
            Run(sequence=sequence, start=start, token_ids=token_ids, samples=True, parents=batch.parents[i, :count])
        )
    return runs


def _slice(sequence: Sequence, start: int, stop: int, *, samples: bool) -> Run:
    return Run(sequence=sequence, start=start, token_ids=sequence.token_ids[start:stop], samples=samples)


def pack(
    rows: SequenceOf[Run], tiles: SequenceOf[Run], shape: StepShape, num_steps: int, first_page: int = 0
) -> np.ndarray:
    """Write runs of one rank into a packed array.

    Args:
        rows: Runs whose tokens become rows, `shape.num_rows` tokens at most.
        tiles: Runs whose tokens fill tiles, `shape.num_tiles` at most.
        shape: The bucket; holds all requests.
        num_steps: Decode steps to run at most.
        first_page: The rank's first page, from which its block tables count.

    Returns:
        int32 [packed_size(shape)]; request i is the i-th run, those of rows first.
    """
    packed = np.zeros(packed_size(shape), np.int32)
    packed[0] = num_steps
    requests, tokens, last_tokens = views(packed, shape)
    floats = requests.view(np.float32)
    floats[:, TEMPERATURE] = floats[:, TOP_P] = 1.0
    requests[:, STOP_IDS:NUM_FIELDS] = -1
    tokens[:, PARENT] = tokens[:, COLUMN] = last_tokens[:] = -1
    place = 0
    for index, run in enumerate((*rows, *tiles)):
        if index == len(rows):
            place = shape.num_rows
        _write_request(requests[index], floats[index], run, shape.num_pages, first_page)
        count = len(run.token_ids)
        _write_tokens(tokens[place : place + count], run, index, place, shape)
        last_tokens[index] = place + count - 1 if run.samples else -1
        place += count if index < len(rows) else -(-count // shape.tile) * shape.tile
    return packed


def views(packed: Any, shape: StepShape) -> tuple[Any, Any, Any]:
    """The parts of a packed array, numpy's or on a device: requests, tokens, last tokens."""
    width = NUM_FIELDS + shape.num_pages
    requests_end = 1 + shape.num_requests * width
    tokens_end = requests_end + shape.num_tokens * TOKEN_FIELDS
    return (
        packed[1:requests_end].reshape(shape.num_requests, width),
        packed[requests_end:tokens_end].reshape(shape.num_tokens, TOKEN_FIELDS),
        packed[tokens_end:],
    )


def expert_words(shape: StepShape) -> int:
    """Words that the expert ids of a token take in a program's output: two ids each."""
    return 0 if shape.expert_ids is None else -(-math.prod(shape.expert_ids) // 2)


def unpack_outputs(outputs: np.ndarray, shape: StepShape) -> tuple[int, list[NewTokens]]:
    """Steps run, and what each request emitted, from the output of a program of that shape (`make_step`)."""
    table, num_words = outputs[1:].reshape(shape.num_requests, -1), expert_words(shape)
    width = (table.shape[1] - 1) // (2 + num_words)
    counts, token_ids = table[:, 0].tolist(), table[:, 1 : 1 + width]
    logprobs = table[:, 1 + width : 1 + 2 * width].view(np.float32)
    if shape.expert_ids is None:
        return int(outputs[0]), [NewTokens(token_ids[i, :n], logprobs[i, :n]) for i, n in enumerate(counts)]
    halves = table[:, 1 + 2 * width :].reshape(shape.num_requests, width, num_words).view(np.int16)
    experts = halves[:, :, : math.prod(shape.expert_ids)].reshape(shape.num_requests, width, *shape.expert_ids)
    return int(outputs[0]), [NewTokens(token_ids[i, :n], logprobs[i, :n], experts[i, :n]) for i, n in enumerate(counts)]


def _write_request(line: np.ndarray, floats: np.ndarray, run: Run, num_pages: int, first_page: int) -> None:
    sequence = run.sequence
    sampling, key = sequence.chunk.sampling, sequence.chunk.sampling_key
    line[FIRST_POSITION : TOP_K + 1] = (
        run.start,
        sequence.limit - sequence.num_tokens,
        _as_int32(key & 0xFFFFFFFF),
        _as_int32(key >> 32),
        sampling.top_k,
    )
    floats[TEMPERATURE : TOP_P + 1] = sampling.temperature, sampling.top_p
    line[STOP_IDS : STOP_IDS + len(sampling.stop_token_ids)] = sampling.stop_token_ids
    pages = [page - first_page for page in sequence.pages[:num_pages]] if first_page else sequence.pages[:num_pages]
    line[NUM_FIELDS : NUM_FIELDS + len(pages)] = pages


def _write_tokens(tokens: np.ndarray, run: Run, index: int, place: int, shape: StepShape) -> None:
    count = len(tokens)
    offsets = np.arange(count)
    tokens[:, TOKEN], tokens[:, REQUEST], tokens[:, OFFSET] = run.token_ids, index, offsets
    tokens[:, DEPTH], tokens[:, LIMIT] = offsets, offsets + 1
    if run.parents is None:
        if run.samples:
            tokens[-1, COLUMN] = 0
        return
    tokens[1:, PARENT] = place + 1 + run.parents
    if shape.has_trees:
        depths, masks = np.zeros(count, np.int32), np.zeros(count, np.uint32)
        for i, parent in enumerate(run.parents.tolist(), start=1):
            depths[i] = depths[parent + 1] + 1
            masks[i] = masks[parent + 1] | np.uint32(1 << (i - 1))
        tokens[:, DEPTH], tokens[:, LIMIT], tokens[:, MASK] = depths, 1, masks.view(np.int32)
    tokens[:, COLUMN] = tokens[:, DEPTH]


def _as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
