"""The drafter of one instance: it drafts from what the group has said, and keeps no more than it needs."""

import dataclasses
import weakref

import numpy as np
import pytest

from seer_jax.core.draft import kernels
from seer_jax.core.draft.client import DraftClient
from seer_jax.core.draft.messages import ExchangeReply, TokenDelta
from seer_jax.core.draft.server import DraftServer
from seer_jax.core.draft.speculate import DraftBatch, SpeculationArgs
from seer_jax.core.sequence import NewTokens, Sequence
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams

PROMPT = np.array([60, 61, 62, 63], np.int32)


def make_sequence(
    request_id: RequestId,
    known: list[int] | np.ndarray = (),
    *,
    prompt: np.ndarray = PROMPT,
    max_chunk: int = 100,
    max_tokens: int = 10_000,
) -> Sequence:
    """A sequence whose chunk starts after some generated tokens."""
    token_ids = np.concatenate([prompt, np.asarray(known, np.int32)])
    chunk = RequestChunk(
        request_id=request_id,
        chunk_index=0,
        token_ids=token_ids,
        num_prompt_tokens=len(prompt),
        max_chunk_tokens=max_chunk,
        max_total_tokens=len(prompt) + max_tokens,
        num_reserved_pages=0,
        policy_version=0,
        priority=0,
        sampling=SamplingParams(max_tokens=max_tokens),
        sampling_key=0,
    )
    return Sequence(chunk, 0)


def say(sequence: Sequence, token_ids: list[int] | np.ndarray) -> Sequence:
    """Generate tokens."""
    sequence.extend(NewTokens(np.asarray(token_ids, np.int32), np.zeros(len(token_ids), np.float32)))
    return sequence


def make_client(max_spec_tokens: int = 3, *, grouped: bool = True, top_k: int = 1, **options: float) -> DraftClient:
    """A client that drafts everything it finds."""
    args = SpeculationArgs(max_spec_tokens=max_spec_tokens, top_k=top_k)
    return DraftClient(args, grouped=grouped, **{"ttl_seconds": 600.0} | options)


def draft_lines(client: DraftClient, *sequences: Sequence, budget: int = 3) -> list[list[int]]:
    """The drafted tokens of sequences."""
    return lines_of(client.draft(sequences, np.full(len(sequences), budget, np.int32)))


def lines_of(batch: DraftBatch) -> list[list[int]]:
    """The drafted tokens of each row."""
    return [row[:count].tolist() for row, count in zip(batch.token_ids, batch.num_nodes, strict=True)]


def exchange(client: DraftClient, server: DraftServer) -> None:
    """One exchange in which nothing is lost."""
    client.apply(server.exchange(client.epoch, client.updates(), client.held()))


def test_grouped_drafts_from_siblings_and_suffix_does_not() -> None:
    def drafts(grouped: bool) -> list[int]:
        client = make_client(grouped=grouped)
        client.observe(say(make_sequence(RequestId(0, 0)), [10, 11, 12, 13]))
        (draft,) = draft_lines(client, say(make_sequence(RequestId(0, 1)), [10]))
        return draft

    assert drafts(grouped=True) == [11, 12, 13]
    assert drafts(grouped=False) == []


def test_a_request_that_comes_back_shorter_drafts_from_its_new_text() -> None:
    """Its last instance got further and was lost with its report; what it said is known here."""
    client = make_client()
    first = say(make_sequence(RequestId(0, 0)), [10, 11, 12, 13])
    draft_lines(client, first)
    client._running.clear()  # It left, and the server told how it went on elsewhere.
    client._groups[0,].responses[0].sequence = None
    delta = TokenDelta(request_id=RequestId(0, 0), prev_token_count=4, token_ids=np.array([18, 19, 20], np.int32))
    client.apply(ExchangeReply(epoch=0, num_held={}, deltas=[delta]))
    again = make_sequence(RequestId(0, 0), [10, 11, 12, 13])
    assert draft_lines(client, again) == [[18, 19, 20]]


def test_a_request_on_its_own_drafts_from_itself_and_tells_nobody() -> None:
    client = make_client(grouped=False)
    assert draft_lines(client, say(make_sequence(RequestId(0, 1)), [10, 11, 12, 10])) == [[11, 12, 10]]
    assert client.updates() == [] and client.held() == []
    delta = TokenDelta(request_id=RequestId(0, 0), prev_token_count=0, token_ids=np.array([1], np.int32))
    client.apply(ExchangeReply(epoch=0, deltas=[delta], num_held={RequestId(0, 1): 4}))
    assert client.held() == []


def test_drafts_of_a_group_that_grows_during_the_call_are_those_of_one_that_had() -> None:
    """Twelve siblings outgrow the first cursors, 4,000 tokens the first arrays, all in one call."""
    rng = np.random.default_rng(0)
    client = make_client(4)
    text = rng.integers(0, 50, 450).astype(np.int32)
    sequences = [say(make_sequence(RequestId(0, i), max_chunk=500), text[: 450 - i]) for i in range(12)]
    drafts = draft_lines(client, *sequences, budget=4)
    # Sibling i is i tokens behind the first.
    for i, draft in enumerate(drafts):
        assert draft[:i] == text[450 - i : 450][:4].tolist()
    assert draft_lines(client, *sequences, budget=4) == drafts


def test_drafts_do_not_depend_on_the_batch_or_on_who_was_in_the_last() -> None:
    rng = np.random.default_rng(1)
    client = make_client(4, top_k=3)
    sequences = [make_sequence(RequestId(i // 3, i), max_chunk=2000) for i in range(9)]
    for _ in range(40):
        batch = [sequences[i] for i in rng.permutation(9)[: rng.integers(1, 10)]]
        for sequence in batch:
            say(sequence, rng.integers(0, 4, rng.integers(0, 40)))
        budgets = rng.integers(0, 7, len(batch)).astype(np.int32)
        drafts = lines_of(client.draft(batch, budgets))
        assert drafts == [lines_of(client.draft([s], budgets[i : i + 1]))[0] for i, s in enumerate(batch)]
        assert all(len(draft) <= budget for draft, budget in zip(drafts, budgets, strict=True))
    fresh = make_client(4, top_k=3)
    matched, expected = (c.draft(sequences, np.full(9, 4, np.int32)).match_length for c in (client, fresh))
    assert matched.tolist() == expected.tolist() and matched.min() > 3


def test_draft_follows_its_request_when_only_the_cursors_moved() -> None:
    client, first = make_client(), say(make_sequence(RequestId(0, 0)), [10, 11, 12, 10])
    assert draft_lines(client, first) == [[11, 12, 10]]
    for i in range(1, 20):
        client.observe(make_sequence(RequestId(0, i)))
    assert draft_lines(client, say(first, [11])) == [[12, 10, 11]]


def test_finished_sequences_are_not_kept() -> None:
    client, sequence = make_client(), say(make_sequence(RequestId(0, 0), max_chunk=2), [10, 11])
    client.observe(sequence)
    kept = weakref.ref(sequence)
    del sequence
    assert kept() is None
    assert [update.token_ids.tolist() for update in client.updates()] == [[10, 11]]


def test_trees_branch_and_calibration_weighs_their_nodes() -> None:
    client = make_client(top_k=2)
    for i, after in enumerate([11, 12, 12]):
        client.observe(say(make_sequence(RequestId(0, i)), [10, after]))
    asking, budget = [say(make_sequence(RequestId(0, 3)), [10])], np.array([4], np.int32)
    batch = client.draft(asking, budget)
    assert lines_of(batch) == [[12, 11]] and batch.parents[0, :2].tolist() == [-1, -1]
    likeliest = batch.scores[0, 0]
    batch = client.draft(asking, budget, np.full(kernels.NUM_BINS, 0.5, np.float32))
    assert batch.scores[0, 0] == pytest.approx(likeliest / 2)


def test_no_sequences_have_no_drafts() -> None:
    assert draft_lines(make_client()) == []


def test_group_is_forgotten_after_its_time_to_live_and_built_again() -> None:
    client = make_client(ttl_seconds=10.0)
    first, second = (say(make_sequence(RequestId(g, 0)), [10, 11, 12, 10]) for g in range(2))
    for sequence in (first, second):
        client.observe(sequence)
    client.expire(100.0)
    client.expire(109.0)
    assert len(client.held()) == 2
    client.observe(first)
    client.expire(109.0)  # The first was used: it stays until 119.
    client.expire(111.0)
    assert [group.group_id for group in client.held()] == [0]
    client.expire(119.0)
    assert client.held() == [] and client.updates() == []
    assert draft_lines(client, first, second, budget=2) == [[11, 12], [11, 12]]


def test_forgotten_group_gets_its_siblings_back_from_the_server() -> None:
    server, client = DraftServer(), make_client(ttl_seconds=10.0)
    client.observe(say(make_sequence(RequestId(0, 0), max_chunk=4), [10, 11, 12, 13]))
    asking = say(make_sequence(RequestId(0, 1)), [10])
    client.observe(asking)
    exchange(client, server)
    client.expire(0.0)
    client.expire(10.0)
    assert draft_lines(client, asking) == [[]]
    exchange(client, server)
    assert draft_lines(client, asking) == [[11, 12, 13]]


def test_group_in_use_never_expires() -> None:
    client, sequence = make_client(ttl_seconds=1.0), say(make_sequence(RequestId(0, 0)), [10, 11, 10])
    for now in np.arange(0.0, 50.0, 5.0).tolist():
        assert draft_lines(client, sequence, budget=1) == [[11]]
        client.expire(now)
        assert len(client.held()) == 1


def test_new_weights_forget_what_the_old_ones_said() -> None:
    client, sequence = make_client(), say(make_sequence(RequestId(0, 0)), [10, 11, 10])
    client.observe(sequence)
    client.clear(1)
    assert client.epoch == 1 and client.held() == [] and client.updates() == []
    client.observe(say(make_sequence(RequestId(0, 1)), [10]))
    assert draft_lines(client, sequence) == [[11, 10, 11]] and len(client.held()[0].num_held) == 2


def test_request_that_comes_back_goes_on_with_what_was_said_elsewhere() -> None:
    server, here, there = DraftServer(), make_client(), make_client()
    here.observe(say(make_sequence(RequestId(0, 0), max_chunk=2), [1, 2]))
    exchange(here, server)
    there.observe(say(make_sequence(RequestId(0, 0), [1, 2], max_chunk=2), [3, 4]))
    exchange(there, server)
    reply = server.exchange(0, here.updates(), here.held())
    here.apply(reply)
    # A late answer, of before the server knew anything: what was said here is sent again, and no more than that.
    here.apply(dataclasses.replace(reply, deltas=[], num_held={RequestId(0, 0): 0}))
    assert [update.token_ids.tolist() for update in here.updates()] == [[1, 2]]
    here.apply(reply)
    back = say(make_sequence(RequestId(0, 0), [1, 2, 3, 4]), [1, 2])
    assert draft_lines(here, back) == [[3, 4, 1]]
    # What came from the server is not sent to it again.
    (update,) = here.updates()
    assert update.prev_token_count == 4 and update.token_ids.tolist() == [1, 2]


def test_lost_chunk_is_drafted_from_what_the_lost_instance_said() -> None:
    server, lost, here = DraftServer(), make_client(), make_client()
    here.observe(say(make_sequence(RequestId(0, 1)), [30]))
    lost.observe(say(make_sequence(RequestId(0, 0)), [1, 2, 3, 4, 5, 6]))
    exchange(lost, server)
    exchange(here, server)
    again = say(make_sequence(RequestId(0, 0), max_chunk=8), [1, 2])
    assert draft_lines(here, again) == [[3, 4, 5]]
    exchange(here, server)
    assert server.fetch_cst(here.held()) == []  # Nothing more is sent of it while it runs here.
    assert draft_lines(here, say(again, [3])) == [[4, 5, 6]]
    here.observe(say(again, [4, 5, 6, 7, 8]))
    exchange(here, server)
    (held,) = here.held()
    deltas = server.fetch_cst([dataclasses.replace(held, num_held={1: held.num_held[1]})])
    assert [delta.token_ids.tolist() for delta in deltas] == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_server_may_not_say_what_comes_next_of_a_sequence_that_runs_here() -> None:
    client, sequence = make_client(), say(make_sequence(RequestId(0, 0)), [10, 11, 12, 10])
    client.observe(sequence)
    delta = TokenDelta(request_id=RequestId(0, 0), prev_token_count=2, token_ids=np.array([12, 10, 50], np.int32))
    client.apply(ExchangeReply(epoch=0, deltas=[delta], num_held={}))
    assert draft_lines(client, sequence) == [[11, 12, 10]]


def test_nothing_is_compiled_after_warmup() -> None:
    """Arrays from another process are read-only, which numba takes for another type."""
    client = make_client()
    client.warmup()
    loops = kernels.append, kernels.rehash, kernels.draft_batch
    compiled = [len(loop.signatures) for loop in loops]
    assert all(compiled)
    asking = say(make_sequence(RequestId(0, 1)), [10])
    client.observe(asking)
    token_ids = np.arange(10, 3000, dtype=np.int32)
    token_ids.flags.writeable = False
    delta = TokenDelta(request_id=RequestId(0, 0), prev_token_count=0, token_ids=token_ids)
    client.apply(ExchangeReply(epoch=0, deltas=[delta], num_held={}))
    assert draft_lines(client, asking) == [[11, 12, 13]]
    assert [len(loop.signatures) for loop in loops] == compiled
