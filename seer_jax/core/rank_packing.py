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
        buckets.pick(len(of_rows), map(_count, of_slices), truncating)
        for of_rows, of_slices in _by_rank(buckets.num_ranks, rows, slices)
    )


def pick_verify_shape(buckets: StepBuckets, runs: SequenceOf[Run]) -> StepShape:
    """The smallest shape that verifies the runs of every rank."""
    truncating = _any_truncates(runs)
    return _largest(
        buckets.pick_verify(map(_count, of_runs), truncating) for (of_runs,) in _by_rank(buckets.num_ranks, runs)
    )


def pack_ranks(
    rows: SequenceOf[Run], tiles: SequenceOf[Run], shape: StepShape, num_steps: int, buckets: StepBuckets
) -> np.ndarray:
    """`pack` for every rank; a rank's block tables hold page numbers of its own part of the cache."""
    parts = _by_rank(buckets.num_ranks, rows, tiles)
    return np.concatenate(
        [pack(*runs, shape, num_steps, first_page=rank * buckets.rank_pages) for rank, runs in enumerate(parts)]
    )


def unpack_ranks(
    outputs: np.ndarray, rows: SequenceOf[Run], tiles: SequenceOf[Run], shape: StepShape, buckets: StepBuckets
) -> tuple[int, dict[Sequence, NewTokens]]:
    """Steps run, and what each sequence that drew a token says."""
    steps, emitted = 0, {}
    parts = _by_rank(buckets.num_ranks, rows, tiles)
    for output, (of_rows, of_tiles) in zip(outputs.reshape(buckets.num_ranks, -1), parts, strict=True):
        steps, said = unpack_outputs(output, shape)
        runs = (*of_rows, *of_tiles)
        emitted |= {run.sequence: new for run, new in zip(runs, said, strict=False) if run.samples}
    return steps, emitted


def _by_rank(num_ranks: int, *kinds: SequenceOf[Run]) -> SequenceOf[tuple[SequenceOf[Run], ...]]:
    """The runs of each rank, kinds apart."""
    if num_ranks == 1:
        return [kinds]
    return [tuple([run for run in runs if run.sequence.rank == rank] for runs in kinds) for rank in range(num_ranks)]


def _count(run: Run) -> int:
    return len(run.token_ids)


def _any_truncates(runs: SequenceOf[Run]) -> bool:
    return any(truncates(run.sequence.chunk.sampling) for run in runs)


def _largest(shapes: Iterable[StepShape]) -> StepShape:
    """All ranks' programs differ in one number; mixed ones have all rows."""
    return max(shapes, key=lambda shape: (shape.num_tiles, shape.num_rows))
