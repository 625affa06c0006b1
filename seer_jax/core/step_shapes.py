"""The static shapes of the step programs of an engine: few of them, compiled before the first request."""

from collections.abc import Iterable
from dataclasses import dataclass

from seer_jax.config.schema import EngineConfig, SpeculationConfig
from seer_jax.core.kv.page_pool import pages_for_tokens
from seer_jax.core.types import SamplingParams

SMALLEST_BUCKET = 2
"""Rows or tiles of the smallest program: one more compilation would save little."""

VERIFY_TOKENS_PER_SLOT = 4
"""Tokens that a step verifies at most, by default."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The static shape of a step program on each data-parallel rank.

    Attributes:
        num_requests: Requests.
        num_rows: Query tokens that attend alone.
        num_tiles: Tiles of query tokens of one request that attend together.
        tile: Query tokens per tile.
        num_pages: Width of the block tables.
        max_depth: Longest path of drafts that is verified; 0 = no drafts, one token is drawn per request. Else one is
            drawn after every query token.
        has_trees: Whether drafts may branch.
        truncates: Whether any request asks for top-k or top-p; sorting the vocabulary costs run and compile time.
        expert_ids: (MoE layers, experts per token) if the experts behind every token are returned with it, else None.
    """

    num_requests: int
    num_rows: int
    num_tiles: int
    tile: int
    num_pages: int
    max_depth: int = 0
    has_trees: bool = False
    truncates: bool = False
    expert_ids: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Packed query tokens."""
        return self.num_rows + self.num_tiles * self.tile


class StepBuckets:
    """The step shapes that an engine compiles, and the choice among them.

    Data-parallel ranks run the same program at the same time, each for its own requests.
    Decode programs come in a few numbers of rows; mixed programs always have all rows and come in a few numbers of
    tiles; programs that verify come in a few numbers of tokens. Context lengths need no buckets: attention does the
    work of the context that is there. In the deterministic mode there is one shape, so that every token of every
    request is computed by the same program.

    Args:
        config: Slots, pages, prefill; of all ranks together.
        speculation: Drafts; `mode` "off" needs no programs that verify.
        verify_tile: Query tokens of one request that attend together during verification.
        expert_ids: See `StepShape`.
        num_ranks: Data-parallel ranks.

    Attributes:
        num_ranks: As given.
        rank_pages: KV pages of a rank.
        num_slots: Of a rank.
        max_prefill_tokens: Of a rank, in a step.
        max_verify_tokens: Of all ranks together, in a step. A rank has room for a full draft of each of its slots.
    """

    def __init__(
        self,
        config: EngineConfig,
        speculation: SpeculationConfig,
        verify_tile: int = 1,
        expert_ids: tuple[int, int] | None = None,
        num_ranks: int = 1,
    ) -> None:
        self._expert_ids = expert_ids
        self.num_ranks, self.rank_pages = num_ranks, config.num_pages // num_ranks
        self.max_pages = pages_for_tokens(config.max_model_len, config.page_size)
        self.num_slots = num_slots = config.max_num_seqs // num_ranks
        max_prefill_tokens = config.max_prefill_tokens // num_ranks
        self._verifies = speculation.mode != "off"
        self._is_deterministic = config.deterministic
        self._has_trees = speculation.mode == "grouped_tree"
        self._depth = speculation.max_draft_tokens
        if config.deterministic:
            self.tile = self.verify_tile = 1
            self.max_prefill_tokens = min(max_prefill_tokens, num_slots)
            self._num_rows = num_slots + self.max_prefill_tokens
            if num_ranks > 1:  # One rank may verify more than an even share, and all modes have one program.
                self._num_rows = max(self._num_rows, num_slots * (1 + self._depth))
            self.max_verify_tokens = num_ranks * self._num_rows
            return
        self.tile, self.verify_tile = config.prefill_tile, verify_tile
        max_tiles = pages_for_tokens(max_prefill_tokens, self.tile)
        self.max_prefill_tokens = max_tiles * self.tile
        self._rows = geometric_buckets(min(SMALLEST_BUCKET, num_slots), num_slots)
        self._tiles = geometric_buckets(min(SMALLEST_BUCKET, max_tiles), max_tiles)
        tiles_per_slot = pages_for_tokens(1 + speculation.max_draft_tokens, verify_tile)
        all_slots = config.max_num_seqs
        most = (speculation.max_verify_tokens or VERIFY_TOKENS_PER_SLOT * all_slots) // verify_tile
        most = min(max(most, all_slots), tiles_per_slot * all_slots)
        self._verify = fine_buckets(min(most, tiles_per_slot * num_slots))
        self.max_verify_tokens = most * verify_tile

    def all_shapes(self, truncates: bool) -> list[StepShape]:
        """Every shape that can be picked for requests that all truncate, or all do not."""
        mixed = [] if self._is_deterministic else [self._mixed_shape(tiles, truncates) for tiles in self._tiles]
        return self.decode_shapes(truncates) + mixed + self.verify_shapes(truncates)

    def verify_shapes(self, truncates: bool) -> list[StepShape]:
        """Those of `all_shapes` that verify drafts and do nothing else, smallest first."""
        if self._is_deterministic or not self._verifies:
            return []
        return [self._verify_shape(count, truncates) for count in self._verify]

    def decode_shapes(self, truncates: bool) -> list[StepShape]:
        """Those of `all_shapes` that decode without drafts, smallest first."""
        if self._is_deterministic:
            return [self._deterministic_shape()]
        return [self._decode_shape(rows, truncates) for rows in self._rows]

    def pick(self, num_rows: int, slice_lengths: Iterable[int], truncates: bool) -> StepShape:
        """The smallest shape that holds so many decoding requests and prompt slices of these lengths."""
        if self._is_deterministic:
            return self._deterministic_shape()
        num_tiles = sum(pages_for_tokens(length, self.tile) for length in slice_lengths)
        if num_tiles:
            return self._mixed_shape(pick_bucket(num_tiles, self._tiles), truncates)
        return self._decode_shape(pick_bucket(num_rows, self._rows), truncates)

    def pick_verify(self, run_lengths: Iterable[int], truncates: bool) -> StepShape:
        """The smallest shape that verifies runs of these lengths, their newest tokens included."""
        if self._is_deterministic:
            return self._deterministic_shape()
        count = sum(pages_for_tokens(length, self.verify_tile) for length in run_lengths)
        return self._verify_shape(pick_bucket(count, self._verify), truncates)

    def _decode_shape(self, num_rows: int, truncates: bool) -> StepShape:
        return self._shape(num_requests=num_rows, num_rows=num_rows, truncates=truncates)

    def _mixed_shape(self, num_tiles: int, truncates: bool) -> StepShape:
        return self._shape(num_rows=self.num_slots, num_tiles=num_tiles, truncates=truncates)

    def _verify_shape(self, count: int, truncates: bool) -> StepShape:
        size = {"num_rows": count} if self.verify_tile == 1 else {"num_tiles": count, "tile": self.verify_tile}
        return self._shape(
            num_requests=min(count, self.num_slots),
            max_depth=self._depth,
            has_trees=self._has_trees,
            truncates=truncates,
            **size,
        )

    def _deterministic_shape(self) -> StepShape:
        # Also without drafts, so that the tokens of all modes come from one program.
        return self._shape(num_rows=self._num_rows, max_depth=self._depth, has_trees=self._has_trees, truncates=True)

    def _shape(self, **fields: int) -> StepShape:
        defaults = {"num_requests": self.num_slots, "num_rows": 0, "num_tiles": 0, "tile": self.tile}
        return StepShape(**defaults | {"num_pages": self.max_pages, "expert_ids": self._expert_ids} | fields)


def truncates(sampling: SamplingParams) -> bool:
    """Whether a request needs the programs that look at top-k and top-p."""
    return sampling.top_k > 0 or sampling.top_p < 1


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


def fine_buckets(largest: int) -> tuple[int, ...]:
    """4, 6, 8, 12, 16, 24, ... and always `largest`: a third of padding at most."""
    powers = geometric_buckets(4, largest)
    return tuple(sorted({b for p in powers for b in (p, p + p // 2) if b < largest} | {largest}))
