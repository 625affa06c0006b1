"""Keys, headers, memory and the order of eviction, each by itself."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.core.errors import TransferError
from seer_jax.kvpool import block_key, chain_keys, fingerprint
from seer_jax.kvpool.arena import ALIGN_BYTES, Arena
from seer_jax.kvpool.blocks import HEADER_BYTES, BlockHeader, decode_header, encode_header
from seer_jax.kvpool.eviction import Ranks, VictimQueue
from tests.kvpool.blocks import make_key

HEADER = BlockHeader(
    key=make_key(1), dtype="bfloat16", shape=(3, 2, 4, 64), priority=0.5, payload_bytes=3072, checksum=2**64 - 1
)


def test_a_key_changes_with_everything_that_kv_depends_on():
    tokens = np.arange(8)
    layout = fingerprint(model="a", dtype="bfloat16", page_size=16)
    first = block_key(None, tokens, epoch=1, layout=layout)
    others = [
        block_key(first, tokens, epoch=1, layout=layout),
        block_key(None, tokens[:-1], epoch=1, layout=layout),
        block_key(None, tokens + 1, epoch=1, layout=layout),
        block_key(None, tokens, epoch=2, layout=layout),
        block_key(None, tokens, epoch=1, layout=fingerprint(model="b", dtype="bfloat16", page_size=16)),
    ]
    assert len({first, *others}) == 6
    assert layout == fingerprint(page_size=16, dtype="bfloat16", model="a")
    assert first == block_key(None, tokens.astype(np.int32), epoch=1, layout=layout)


def test_sequences_share_the_keys_of_their_common_prefix_and_none_behind_it():
    one, other = np.arange(64), np.arange(64)
    other[20] += 1
    keys = [chain_keys(tokens, 8, epoch=0, layout=b"") for tokens in (one, other, one[:-1])]
    assert [a == b for a, b in zip(keys[0], keys[1], strict=True)] == [True] * 2 + [False] * 6
    assert keys[2] == keys[0][:-1]
    assert [key.parent for key in keys[0][1:]] == [key.digest for key in keys[0][:-1]]


def test_a_header_says_what_it_was_made_from():
    assert decode_header(encode_header(HEADER)) == HEADER
    assert decode_header(encode_header(HEADER)).key.parent == HEADER.key.parent


def test_a_header_with_any_byte_changed_is_refused_with_the_reason():
    good = encode_header(HEADER)
    for index in range(HEADER_BYTES):
        bad = bytearray(good)
        bad[index] ^= 4
        with pytest.raises(TransferError, match="starts with" if index < 8 else "damaged"):
            decode_header(bytes(bad))
    with pytest.raises(TransferError, match=f"{HEADER_BYTES - 1} bytes of"):
        decode_header(good[:-1])


def test_a_header_names_the_arrays_it_describes():
    header = dataclasses.replace(HEADER, dtype="float32")
    assert header.describes(np.zeros(HEADER.shape, np.float32))
    assert not header.describes(np.zeros(HEADER.shape, np.int32))
    assert not header.describes(np.zeros(HEADER.shape[1:], np.float32))


@given(st.lists(st.integers(0, 5 * ALIGN_BYTES), max_size=60), st.randoms())
def test_memory_is_given_out_once_comes_back_whole_and_is_never_too_scattered(sizes, random):
    arena, slots = Arena(16 * ALIGN_BYTES), []
    for size in sizes:
        slot = arena.allocate(size)
        assert (slot is not None) == (-(-size // ALIGN_BYTES) * ALIGN_BYTES <= arena.free_bytes + _held(slot))
        if slot is not None:
            data = np.full(size, len(slots) % 256, np.uint8)
            slots.append((slot, data, arena.write(slot, data)))
        elif slots:
            slot, data, checksum = slots.pop(random.randrange(len(slots)))
            out = np.empty_like(data)
            assert arena.read(slot, out) == checksum
            assert np.array_equal(out, data)
            arena.free(slot)
    for slot, _, _ in slots:
        arena.free(slot)
    assert arena.free_bytes == arena.size_bytes
    assert len(arena.allocate(arena.size_bytes).extents) == 1


def _held(slot):
    return 0 if slot is None else slot.size_bytes


def _drain(queue):
    return [digest for digest in iter(queue.pop, None)]


def _queue(names):
    ranks = Ranks()
    queue = VictimQueue(ranks)
    for name in names:
        ranks.use(name)
        queue.add(name)
    return ranks, queue


def test_blocks_used_equally_often_go_in_order_of_last_use():
    ranks, queue = _queue([b"a", b"b", b"c", b"d"])
    for name in (b"c", b"a", b"d", b"b"):
        ranks.use(name)
    assert _drain(queue) == [b"c", b"a", b"d", b"b"]


def test_the_lowest_priority_goes_first_and_a_raise_counts():
    ranks, queue = _queue([b"a", b"b", b"c"])
    ranks.use(b"a", 2.0)
    ranks.use(b"b", 1.0)
    ranks.use(b"a", 0.0)
    assert _drain(queue) == [b"c", b"b", b"a"]


def test_a_block_used_often_outlives_newer_ones_but_not_for_ever():
    ranks, queue = _queue([b"shared", *(bytes([name]) for name in range(100, 107))])
    ranks.use(b"shared")
    order = []
    for name in range(40):
        ranks.use(bytes([name]))
        queue.add(bytes([name]))
        if len(queue) > 8:
            order.append(queue.pop())
            ranks.forget(order[-1])
    # The 7 older ones, and as many newer ones as there are others: a turnover of the pool.
    assert order.index(b"shared") == 7 + 7


def test_coming_and_going_over_and_over_takes_no_more_memory():
    ranks, queue = _queue([bytes([name]) for name in range(8)])
    for _ in range(1000):
        queue.discard(b"\0")
        queue.add(b"\0")
        ranks.use(b"\0")
        ranks.use(b"gone")
        ranks.forget(b"gone")
    assert len(queue._heap) < 100
    assert len(queue) == len(_drain(queue)) == 8
