"""Names of KV blocks: a block is what certain weights computed from certain tokens, laid out in a certain way."""

import hashlib
import json
import struct
from dataclasses import dataclass, field

import numpy as np

DIGEST_BYTES = 16
ROOT = bytes(DIGEST_BYTES)
"""Parent of a block that starts at position 0."""


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Name of a block; equal if the digests are.

    Attributes:
        digest: blake2b-128 of everything below, the tokens and the fingerprint.
        parent: Digest of the block before it, `ROOT` for the first.
        epoch: Version of the weights that computed it.
        num_tokens: Tokens in this block, those of its parents not counted.
    """

    digest: bytes
    parent: bytes = field(compare=False)
    epoch: int = field(compare=False)
    num_tokens: int = field(compare=False)


def fingerprint(**facts: int | float | str | bool | None) -> bytes:
    """Digest of what KV depends on beside weights and tokens: model, type, page size, row width, layout.

    Args:
        facts: Plain values by name; their order does not matter.

    Returns:
        16 bytes.
    """
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def block_key(parent: BlockKey | None, tokens: np.ndarray, *, epoch: int, layout: bytes) -> BlockKey:
    """Name the block of `tokens` that follows `parent`.

    Without the epoch, KV of old weights would pass for that of new ones; without the parent, a block would be taken
    out of its context.

    Args:
        parent: Block before it; None = it starts at position 0.
        tokens: [num_tokens] ids below 2^31.
        epoch: Version of the weights.
        layout: Of `fingerprint`.
    """
    before = ROOT if parent is None else parent.digest
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"seer kv block")
    digest.update(before + struct.pack("<qQ", epoch, len(tokens)) + layout)
    digest.update(np.ascontiguousarray(tokens, "<i4"))
    return BlockKey(digest.digest(), before, epoch, len(tokens))


def chain_keys(tokens: np.ndarray, block_tokens: int, *, epoch: int, layout: bytes) -> list[BlockKey]:
    """Name the full blocks of a sequence, first to last; requests with a common prefix share their first names.

    Args:
        tokens: [num_tokens] from position 0 on; a rest of less than a block gets no name.
        block_tokens: Tokens per block.
        epoch: Version of the weights.
        layout: Of `fingerprint`.
    """
    keys: list[BlockKey] = []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = keys[-1] if keys else None
        keys.append(block_key(parent, tokens[start : start + block_tokens], epoch=epoch, layout=layout))
    return keys
