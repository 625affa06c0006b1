"""A block behind its header in one piece of memory, as a store that knows neither keeps it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seer_jax.core.errors import TransferError
from seer_jax.kvpool.arena import copy_both_ways
from seer_jax.kvpool.blocks import HEADER_BYTES, BlockHeader, decode_header, encode_header, type_name
from seer_jax.kvpool.keys import BlockKey
from seer_jax.kvpool.pool import Status


@dataclass(frozen=True, slots=True)
class Frame:
    """One block of a batch, to be stored or to be filled.

    Attributes:
        key: Its key.
        name: Its name in the store.
        array: The caller's.
        flat: The array's bytes.
    """

    key: BlockKey
    name: str
    array: np.ndarray
    flat: np.ndarray

    @property
    def size(self) -> int:
        """Bytes in the store."""
        return HEADER_BYTES + len(self.flat)

    def write(self, memory: np.ndarray) -> None:
        """Copy header and bytes to `memory`, [size] uint8."""
        checksum = copy_both_ways(iter([memory[HEADER_BYTES:]]), self.flat, inwards=True)
        header = BlockHeader(
            key=self.key,
            dtype=type_name(self.array.dtype),
            shape=self.array.shape,
            priority=0.0,
            payload_bytes=len(self.flat),
            checksum=checksum,
        )
        memory[:HEADER_BYTES] = np.frombuffer(encode_header(header), np.uint8)

    def read(self, memory: np.ndarray) -> tuple[Status, bool]:
        """Copy the bytes out of `memory` if they are this block's.

        Args:
            memory: [any length] uint8, as it came from the store.

        Returns:
            HIT or CORRUPT, and whether what is stored is sound: it may be so for an array of another shape.
        """
        try:
            header = decode_header(memory[:HEADER_BYTES].tobytes())
        except TransferError:
            return Status.CORRUPT, False
        if header.key != self.key or HEADER_BYTES + header.payload_bytes != len(memory):
            return Status.CORRUPT, False
        if not header.describes(self.array):
            return Status.CORRUPT, True
        is_sound = copy_both_ways(iter([memory[HEADER_BYTES:]]), self.flat, inwards=False) == header.checksum
        return (Status.HIT if is_sound else Status.CORRUPT), is_sound


def batches(frames: Sequence[Frame], max_bytes: int) -> Iterator[list[Frame]]:
    """Runs of frames of at most `max_bytes` together; one that is larger by itself comes alone."""
    batch: list[Frame] = []
    size = 0
    for frame in frames:
        if batch and size + frame.size > max_bytes:
            yield batch
            batch, size = [], 0
        batch.append(frame)
        size += frame.size
    if batch:
        yield batch


def views(frames: Sequence[Frame], buffer: np.ndarray) -> list[np.ndarray]:
    """Memory for each frame, one behind the other."""
    ends = np.cumsum([frame.size for frame in frames]).tolist()
    return [buffer[end - frame.size : end] for frame, end in zip(frames, ends, strict=True)]
