"""One step of all data-parallel ranks: one shape, one packed array and one output, rank after rank."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from seer_jax.core.packing import Run, pack, unpack_outputs
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.step_shapes import StepBuckets, StepShape, truncates


def pick_shape(buckets: StepBuckets, rows: SequenceOf[Run], slices: SequenceOf[Run]) -> StepShape:
    """The smallest shape that holds the decode rows and prompt slices of every rank."""
    truncating = _any_truncates([*rows, *slices])
    return _largest(
        buckets.pick(len(_of_rank(rows, rank)), map(_count, _of_rank(slices, rank)), truncating)
        for rank in range(buckets.num_ranks)
    )


def pick_verify_shape(buckets: StepBuckets, runs: SequenceOf[Run]) -> StepShape:
    """The smallest shape that verifies the runs of every rank."""
    truncating = _any_truncates(runs)
    return _largest(
        buckets.pick_verify(map(_count, _of_rank(runs, rank)), truncating) for rank in range(buckets.num_ranks)
    )


def pack_ranks(
    rows: SequenceOf[Run], tiles: SequenceOf[Run], shape: StepShape, num_steps: int, buckets: StepBuckets
) -> np.ndarray:
    """`pack` for every rank; a rank's block tables hold page numbers of its own part of the cache."""
    return np.concatenate(
        [
            pack(_of_rank(rows, rank), _of_rank(tiles, rank), shape, num_steps, rank * buckets.rank_pages)
            for rank in range(buckets.num_ranks)
        ]
    )


def unpack_ranks(
    outputs: np.ndarray, rows: SequenceOf[Run], tiles: SequenceOf[Run], shape: StepShape, buckets: StepBuckets
) -> tuple[int, dict[Sequence, NewTokens]]:
    """Steps run, and what each sequence that drew a token says, in the order of the runs."""
    steps, emitted = 0, {}
    for rank, part in enumerate(outputs.reshape(buckets.num_ranks, -1)):
        steps, said = unpack_outputs(part, shape)
        emitted |= {run.sequence: new for run, new in zip(_of_rank([*rows, *tiles], rank), said, strict=False)}
    return steps, {run.sequence: emitted[run.sequence] for run in (*rows, *tiles) if run.samples}


def _of_rank(runs: SequenceOf[Run], rank: int) -> list[Run]:
    return [run for run in runs if run.sequence.rank == rank]


def _count(run: Run) -> int:
    return len(run.token_ids)


def _any_truncates(runs: SequenceOf[Run]) -> bool:
    return any(truncates(run.sequence.chunk.sampling) for run in runs)


def _largest(shapes: Iterable[StepShape]) -> StepShape:
    """All ranks' programs differ in one number; mixed ones have all rows."""
    return max(shapes, key=lambda shape: (shape.num_tiles, shape.num_rows))
