"""What stands before a block's bytes, on disk and on the wire: enough to know the block and to distrust it."""

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from seer_jax.core.errors import TransferError
from seer_jax.kvpool.keys import BlockKey

MAGIC = b"SEERKVB\n"
VERSION = 1
MAX_DIMS = 8
MAX_NAME = 24
"""Bytes of a type's name."""
PIECE_BYTES = 256 << 10
"""Bytes copied and hashed at a time, so that they are still in cache for the second."""

_FIELDS = struct.Struct("<8sHH24s16s16sqQdQQ8Q")
_CHECK = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECK.size


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockHeader:
    """Description of a stored block.

    Attributes:
        key: Its name.
        dtype: Name of the element type, as numpy or ml_dtypes has it.
        shape: Of the array.
        priority: What it was put with.
        payload_bytes: Length of the array's bytes.
        checksum: xxh3-64 of them.
    """

    key: BlockKey
    dtype: str
    shape: tuple[int, ...]
    priority: float
    payload_bytes: int
    checksum: int

    def describes(self, array: np.ndarray) -> bool:
        """Whether the block has the array's shape and type."""
        return self.dtype == type_name(array.dtype) and self.shape == array.shape


def encode_header(header: BlockHeader) -> bytes:
    """`HEADER_BYTES` bytes, the last 8 of them a checksum of the others."""
    key = header.key
    shape = header.shape + (0,) * (MAX_DIMS - len(header.shape))
    dtype = header.dtype.encode().ljust(MAX_NAME, b"\0")
    sizes = (key.num_tokens, header.priority, header.payload_bytes, header.checksum)
    fields = _FIELDS.pack(MAGIC, VERSION, len(header.shape), dtype, key.digest, key.parent, key.epoch, *sizes, *shape)
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))


def decode_header(data: bytes) -> BlockHeader:
    """Read what `encode_header` wrote.

    Raises:
        TransferError: If it is no header, and why.
    """
    if len(data) != HEADER_BYTES:
        raise TransferError(f"block header has {len(data)} bytes of {HEADER_BYTES}")
    fields, check = data[: _FIELDS.size], data[_FIELDS.size :]
    magic, version, num_dims, dtype, digest, parent, epoch, num_tokens, priority, payload_bytes, checksum, *shape = (
        _FIELDS.unpack(fields)
    )
    if magic != MAGIC:
        raise TransferError(f"block header starts with {magic!r}, not {MAGIC!r}")
    if _CHECK.unpack(check)[0] != xxhash.xxh3_64_intdigest(fields):
        raise TransferError("block header is damaged: its checksum differs")
    if version != VERSION:
        raise TransferError(f"block has format version {version}, this is version {VERSION}")
    return BlockHeader(
        key=BlockKey(digest, parent, epoch, num_tokens),
        dtype=dtype.rstrip(b"\0").decode(),
        shape=tuple(shape[:num_dims]),
        priority=priority,
        payload_bytes=payload_bytes,
        checksum=checksum,
    )


@functools.cache
def type_name(dtype: np.dtype) -> str:
    """Name of an element type; looking it up takes numpy longer than all else that a small block costs.

    Raises:
        ValueError: If it is not a plain native type, or its name is too long for a header.
    """
    if dtype.hasobject or dtype.fields is not None or not dtype.isnative or len(dtype.name) > MAX_NAME:
        raise ValueError(f"KV blocks are of plain native types, not {dtype}")
    return dtype.name


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The array's own bytes, [nbytes] uint8, not copied.

    Raises:
        ValueError: If the array is not contiguous, has too many dimensions, or is not of a type for `type_name`.
    """
    type_name(array.dtype)
    if array.ndim > MAX_DIMS or not array.flags.c_contiguous:
        raise ValueError(f"KV blocks are C-contiguous with at most {MAX_DIMS} dimensions")
    return array.reshape(-1).view(np.uint8)


def bytes_by_key(keys: Sequence[BlockKey], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The arrays' bytes.

    Raises:
        ValueError: If there is not one fitting array for each key.
    """
    if len(keys) != len(arrays):
        raise ValueError(f"{len(keys)} keys, but {len(arrays)} arrays")
    return [bytes_of(array) for array in arrays]


def checksum_of(pieces: Iterable[np.ndarray]) -> int:
    """xxh3-64 of bytes that come in pieces."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()
