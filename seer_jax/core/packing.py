"""A step plan as one int32 array of bucketed shape: one transfer to the device, one compiled program per bucket.

Layout of the packed array: `[num_steps] + entries[num_entries, NUM_FIELDS + num_pages] + token_ids`. An entry is a run
of query tokens of one request that attend together: a decode row (1 token) or a prefill tile (`tile` tokens). Rows come
first.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from seer_jax.config.schema import EngineConfig
from seer_jax.core.batching import StepPlan
from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import MAX_STOP_TOKENS, SamplingParams

FIRST_POSITION, COUNT, SAMPLE, REMAINING, KEY_LOW, KEY_HIGH, TOP_K, TEMPERATURE, TOP_P, STOP_IDS = range(10)
NUM_FIELDS = STOP_IDS + MAX_STOP_TOKENS
"""Columns of an entry before its block table; floats are stored as their bits."""

SMALLEST_BUCKET = 2
"""Rows or tiles of the smallest program: one more compilation would save little."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The static shape of a step program.

    Attributes:
        num_rows: Decode rows.
        num_tiles: Prefill tiles; 0 in a decode program.
        tile: Query tokens per prefill tile.
        num_pages: Width of the block tables.
        truncates: Whether any request asks for top-k or top-p; sorting the vocabulary costs run and compile time.
        verifies: Whether a token is drawn after every token of a tile (its drafts), not after the last one only.
    """

    num_rows: int
    num_tiles: int
    tile: int
    num_pages: int
    truncates: bool = False
    verifies: bool = False

    @property
    def num_entries(self) -> int:
        """Rows and tiles."""
        return self.num_rows + self.num_tiles

    @property
    def num_tokens(self) -> int:
        """Packed query tokens."""
        return self.num_rows + self.num_tiles * self.tile

    @property
    def packed_size(self) -> int:
        """Elements of the packed array."""
        return 1 + self.num_entries * (NUM_FIELDS + self.num_pages) + self.num_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """Query tokens of `sequence` from position `start`; `sample` if the next token is drawn after them."""

    sequence: Sequence
    start: int
    token_ids: np.ndarray
    sample: bool

    @property
    def count(self) -> int:
        """Query tokens."""
        return len(self.token_ids)


def split_entries(plan: StepPlan, tile: int) -> tuple[list[Entry], list[Entry]]:
    """Cut a plan into decode rows and prefill tiles of at most `tile` tokens.

    With `tile == 1` prefill tokens become rows as well: the deterministic mode, where every token of every request is
    computed by the same program at the same shape.
    """
    rows = [_entry(s, s.num_tokens - 1, s.num_tokens, sample=True) for s in plan.decodes]
    tiles = []
    for piece in plan.prefills:
        end = piece.start + piece.count
        for start in range(piece.start, end, tile):
            stop = min(start + tile, end)
            tiles.append(_entry(piece.sequence, start, stop, sample=piece.is_last and stop == end))
    return (rows + tiles, []) if tile == 1 else (rows, tiles)


def split_drafts(
    sequences: SequenceOf[Sequence], drafts: SequenceOf[np.ndarray], *, as_rows: bool
) -> tuple[list[Entry], list[Entry]]:
    """Entries that verify drafts: the newest token and the draft after it, and a token drawn after each of them.

    Args:
        sequences: Sequences ready to decode.
        drafts: int32 draft tokens of each; may be empty.
        as_rows: Every token is a row of its own, as the deterministic mode has it, instead of one tile per sequence.

    Returns:
        Rows and tiles, in the order of the sequences.
    """
    entries = []
    for sequence, draft in zip(sequences, drafts, strict=True):
        start = sequence.num_tokens - 1
        token_ids = np.concatenate([sequence.token_ids[start : start + 1], draft])
        runs = [token_ids[i : i + 1] for i in range(len(token_ids))] if as_rows else [token_ids]
        entries += [Entry(sequence=sequence, start=start + i, token_ids=run, sample=True) for i, run in enumerate(runs)]
    return (entries, []) if as_rows else ([], entries)


def _entry(sequence: Sequence, start: int, stop: int, *, sample: bool) -> Entry:
    return Entry(sequence=sequence, start=start, token_ids=sequence.token_ids[start:stop], sample=sample)


def pack(rows: list[Entry], tiles: list[Entry], shape: StepShape, num_steps: int) -> np.ndarray:
    """Write entries into a packed array.

    Args:
        rows: At most `shape.num_rows` entries of one token.
        tiles: At most `shape.num_tiles` entries.
        shape: The bucket.
        num_steps: Decode steps to run at most.

    Returns:
        int32 [shape.packed_size]; padding entries have count 0 and point at the garbage page.
    """
    packed = np.zeros(shape.packed_size, np.int32)
    packed[0] = num_steps
    table_end = 1 + shape.num_entries * (NUM_FIELDS + shape.num_pages)
    table = packed[1:table_end].reshape(shape.num_entries, -1)
    floats = table.view(np.float32)
    floats[:, TOP_P] = floats[:, TEMPERATURE] = 1.0
    table[:, STOP_IDS:NUM_FIELDS] = -1
    row_tokens = packed[table_end : table_end + shape.num_rows].reshape(-1, 1)
    tile_tokens = packed[table_end + shape.num_rows :].reshape(-1, shape.tile)
    for entries, offset, tokens in ((rows, 0, row_tokens), (tiles, shape.num_rows, tile_tokens)):
        for i, entry in enumerate(entries):
            sequence, sampling, line = entry.sequence, entry.sequence.chunk.sampling, table[offset + i]
            key = sequence.chunk.sampling_key
            line[FIRST_POSITION : TOP_K + 1] = (
                entry.start,
                entry.count,
                entry.sample,
                sequence.limit - sequence.num_tokens,
                _as_int32(key & 0xFFFFFFFF),
                _as_int32(key >> 32),
                sampling.top_k,
            )
            floats[offset + i, TEMPERATURE : TOP_P + 1] = sampling.temperature, sampling.top_p
            line[STOP_IDS : STOP_IDS + len(sampling.stop_token_ids)] = sampling.stop_token_ids
            pages = sequence.pages[: shape.num_pages]
            line[NUM_FIELDS : NUM_FIELDS + len(pages)] = pages
            tokens[i, : entry.count] = entry.token_ids
    return packed


class StepBuckets:
    """The step shapes that an engine compiles, and the choice among them.

    Decode programs come in a few numbers of rows; mixed programs always have all rows and come in a few numbers of
    tiles. Context lengths need no buckets: attention does the work of the context that is there. In the deterministic
    mode there is one shape, so that every token of every request is computed by the same program.

    Args:
        config: Slots, pages, prefill.
        max_draft_tokens: Longest draft to verify; 0 = no drafts.
    """

    def __init__(self, config: EngineConfig, max_draft_tokens: int = 0) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.max_pages = pages_for_tokens(config.max_model_len, config.page_size)
        self._is_deterministic = config.deterministic
        num_slots = config.max_num_seqs
        if config.deterministic:
            self.tile = 1
            self.max_prefill_tokens = min(config.max_prefill_tokens, num_slots)
            self._rows: tuple[int, ...] = (num_slots + self.max_prefill_tokens,)
            self._tiles: tuple[int, ...] = ()
            return
        self.tile = config.prefill_tile
        max_tiles = pages_for_tokens(config.max_prefill_tokens, self.tile)
        self.max_prefill_tokens = max_tiles * self.tile
        self._rows = geometric_buckets(min(SMALLEST_BUCKET, num_slots), num_slots)
        self._tiles = geometric_buckets(min(SMALLEST_BUCKET, max_tiles), max_tiles)

    def all_shapes(self, truncates: bool) -> list[StepShape]:
        """Every shape that `pick` can return for requests that all truncate, or all do not."""
        decode = [self._shape(rows, 0, truncates) for rows in self._rows]
        mixed = [self._shape(self._rows[-1], tiles, truncates) for tiles in self._tiles]
        verify = [self._verify_shape(rows, truncates) for rows in self._rows] if self._verifies_tiles else []
        return decode + mixed + verify

    def pick(self, rows: list[Entry], tiles: list[Entry]) -> StepShape:
        """The smallest shape that holds these entries."""
        truncates = any(_truncates(entry.sequence.chunk.sampling) for entry in rows + tiles)
        if tiles:
            return self._shape(self._rows[-1], pick_bucket(len(tiles), self._tiles), truncates)
        return self._shape(pick_bucket(len(rows), self._rows), 0, truncates)

    def pick_verify(self, rows: list[Entry], tiles: list[Entry]) -> StepShape:
        """The shape that verifies these entries of `split_drafts`."""
        if not tiles:
            return self.pick(rows, tiles)
        truncates = any(_truncates(entry.sequence.chunk.sampling) for entry in tiles)
        return self._verify_shape(pick_bucket(len(tiles), self._rows), truncates)

    @property
    def max_verify_tokens(self) -> int:
        """Tokens, drafts and the newest ones, that one step can verify."""
        return self._rows[-1] if self._is_deterministic else self._rows[-1] * (1 + self.max_draft_tokens)

    @property
    def _verifies_tiles(self) -> bool:
        return self.max_draft_tokens > 0 and not self._is_deterministic

    def _verify_shape(self, num_tiles: int, truncates: bool) -> StepShape:
        width = 1 + self.max_draft_tokens
        return replace(self._shape(0, num_tiles, truncates), tile=width, verifies=True)

    def _shape(self, num_rows: int, num_tiles: int, truncates: bool) -> StepShape:
        return StepShape(
            num_rows=num_rows,
            num_tiles=num_tiles,
            tile=self.tile,
            num_pages=self.max_pages,
            truncates=truncates or self._is_deterministic,
        )


def pick_bucket(value: int, buckets: tuple[int, ...]) -> int:
    """The smallest of the ascending `buckets` that holds `value`."""
    for bucket in buckets:
        if value <= bucket:
            return bucket
    raise ValueError(f"{value} exceeds the largest bucket {buckets[-1]}")


def geometric_buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """`smallest`, twice that, ... and always `largest`."""
    buckets = []
    while smallest < largest:
        buckets.append(smallest)
        smallest *= 2
    return (*buckets, largest)


def _truncates(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
