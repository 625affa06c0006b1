"""Speculative decoding in the engine: whatever is drafted, the tokens are those of plain decoding."""

import dataclasses
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest

from seer_jax.config.schema import SpeculationConfig
from seer_jax.core.draft.client import DraftClient, count_accepted
from seer_jax.core.draft.speculate import SpeculationArgs
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams
from seer_jax.engine.engine import Engine
from tests.engine import tiny
from tests.engine.test_engine import count_compilations

# Cold sampling makes the random model repeat itself, so that drafts are often right.
COLD = SamplingParams(max_tokens=40, temperature=0.3)


def make_engine(mode: str = "grouped", max_draft_tokens: int = 4, **changes: object) -> Engine:
    speculation = SpeculationConfig(mode=mode, max_draft_tokens=max_draft_tokens, min_probability=0.0)
    return Engine(tiny.MODEL, tiny.params(), dataclasses.replace(tiny.CONFIG, **changes), speculation=speculation)


def siblings(count: int, sampling: SamplingParams = COLD, **fields: object) -> list[RequestChunk]:
    fields = {"max_chunk": sampling.max_tokens, "max_tokens": sampling.max_tokens} | fields
    return [tiny.chunk(tiny.prompt(0, 9), index=i, sampling=sampling, **fields) for i in range(count)]


def run(engine: Engine, chunks: SequenceOf[RequestChunk]) -> dict[int, tuple[list[int], bytes]]:
    for chunk in chunks:
        engine.submit(chunk)
    return {i: (e.token_ids.tolist(), e.logprobs.tobytes()) for i, e in tiny.drain(engine).items()}


@pytest.mark.parametrize("mode", ["suffix", "grouped"])
@pytest.mark.parametrize(
    "sampling",
    [
        COLD,
        dataclasses.replace(COLD, temperature=0.0),
        dataclasses.replace(COLD, temperature=0.8, top_k=5, top_p=0.9),
        dataclasses.replace(COLD, stop_token_ids=(3, 17, 40)),
    ],
)
def test_tokens_and_logprobs_are_those_of_cacheless_decoding(mode: str, sampling: SamplingParams) -> None:
    engine = make_engine(mode)
    chunks = siblings(6, sampling)
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    tiny.check_against_reference(chunks, results)
    status = engine.status()
    assert 0 < status.num_accepted_tokens <= status.num_drafted_tokens
    assert status.num_generated_tokens == sum(len(event.token_ids) for event in results.values())


@pytest.mark.parametrize("mode", ["suffix", "grouped"])
def test_deterministic_mode_gives_the_same_bits_with_and_without_drafts(mode: str) -> None:
    expected = run(make_engine("off", deterministic=True), siblings(5))
    engine = make_engine(mode, deterministic=True)
    assert run(engine, siblings(5)) == expected
    assert engine.status().num_accepted_tokens > 0


def test_drafts_survive_preemption_and_pauses() -> None:
    expected = {i: tiny.reference_decode(chunk)[0] for i, chunk in enumerate(siblings(4))}
    engine = make_engine(num_pages=18)  # 17 usable: each request of 49 tokens needs 13
    results = run(engine, siblings(4, reserve=False))
    assert {i: tokens for i, (tokens, _) in results.items()} == expected
    assert engine.status().num_preemptions > 0 and engine.status().num_accepted_tokens > 0

    engine, got = make_engine(), {i: [] for i in range(4)}
    chunks = siblings(4, max_chunk=7)
    while chunks:
        for chunk in chunks:
            engine.submit(chunk)
        chunks_by_index, chunks = {chunk.request_id.index: chunk for chunk in chunks}, []
        for i, event in tiny.drain(engine).items():
            got[i] += event.token_ids.tolist()
            if event.finish_reason == "chunk":
                before = chunks_by_index[i]
                known = np.concatenate([before.token_ids, event.token_ids])
                again = dataclasses.replace(before, token_ids=known, chunk_index=before.chunk_index + 1, kv=event.kv)
                pages = -(-(len(known) + 7) // engine.info.page_size)
                chunks.append(dataclasses.replace(again, num_reserved_pages=pages))
    assert got == expected
    assert engine.status().num_reprefilled_tokens == 0 and engine.status().num_accepted_tokens > 0


class Told(DraftClient):
    """Drafts what it is told instead of what it knows."""

    def __init__(self, drafts: dict[int, list[int]], max_draft_tokens: int) -> None:
        super().__init__(SpeculationArgs(max_spec_tokens=max_draft_tokens), grouped=True)
        self._drafts = drafts

    def draft(self, sequences: SequenceOf[Sequence], budgets: np.ndarray) -> list[np.ndarray]:
        """The told tokens that follow."""
        rest = [self._drafts[s.chunk.request_id.index][s.num_new :] for s in sequences]
        return [np.array(told[:budget], np.int32) for told, budget in zip(rest, budgets, strict=True)]


def test_right_drafts_save_steps_and_wrong_ones_change_nothing() -> None:
    chunks = siblings(2)
    expected = {i: tiny.reference_decode(chunk)[0] for i, chunk in enumerate(chunks)}
    wrong = {i: [(token + 1) % 60 for token in tokens] for i, tokens in expected.items()}
    engine = make_engine()
    for drafts, num_verified, num_accepted in ((expected, 2 * 8, 31 + 32), (wrong, None, 0)):
        engine.start_iteration(engine.policy_version)
        engine._drafter = Told(drafts, 4)
        results = run(engine, chunks)
        assert {i: tokens for i, (tokens, _) in results.items()} == expected
        status = engine.status()
        assert status.num_accepted_tokens == num_accepted
        # Steps of 4 drafted and 1 drawn; the first request's first token comes from its prefill.
        assert num_verified is None or status.num_verified == num_verified


def test_new_weights_forget_what_the_old_ones_said() -> None:
    engine = make_engine()
    run(engine, siblings(2))
    engine.start_iteration(1, tiny.params(1))
    assert not engine._drafter._texts
    chunks = siblings(2, policy_version=1)
    results = run(engine, chunks)
    for i, chunk in enumerate(chunks):
        assert results[i][0] == tiny.reference_decode(chunk, seed=1)[0]


def test_no_program_is_compiled_after_warmup() -> None:
    engine = make_engine(num_pages=91)
    engine.warmup()
    assert count_compilations(lambda: run(engine, siblings(4))) == 0
    assert engine.status().num_accepted_tokens > 0


@pytest.mark.parametrize(
    ("drawn", "draft", "stops", "count"),
    [
        ([5, 6, 7], [5, 6], (), 3),
        ([5, 9, 7], [5, 6], (), 2),
        ([9, 6, 7], [5, 6], (), 1),
        ([5, 6, 7], [5, 6], (5,), 1),
        ([5, 6, 7], [5, 6], (6,), 2),
        ([5, 6, 7], [5, 6], (7,), 3),
        ([5], [], (), 1),
    ],
)
def test_emitted_are_the_drawn_up_to_the_first_surprise_or_stop(
    drawn: list[int], draft: list[int], stops: tuple[int, ...], count: int
) -> None:
    assert count_accepted(np.array(drawn), np.array(draft), stops) == count


def test_drafts_of_a_group_that_grows_during_the_call_are_those_of_one_that_had() -> None:
    """Nine siblings outgrow the first cursors, 4,000 tokens the first arrays, all in one call."""
    rng = np.random.default_rng(0)
    client = DraftClient(SpeculationArgs(max_spec_tokens=4), grouped=True)
    text = rng.integers(0, 50, 450).astype(np.int32)
    sequences = [Sequence(tiny.chunk(tiny.prompt(0, 4), index=i, max_chunk=500, max_tokens=500), i) for i in range(12)]
    for i, sequence in enumerate(sequences):
        sequence.extend(text[: 450 - i], np.zeros(450 - i, np.float32))
    drafts = client.draft(sequences, np.full(12, 4, np.int32))
    # Sibling i is i tokens behind the first.
    for i, draft in enumerate(drafts):
        assert draft[:i].tolist() == text[450 - i : 450][:4].tolist()
    again = client.draft(sequences, np.full(12, 4, np.int32))
    assert [draft.tolist() for draft in again] == [draft.tolist() for draft in drafts]


def test_forgotten_group_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seer_jax.core.draft.client.MAX_AUTOMATA", 0)
    client = DraftClient(SpeculationArgs(max_spec_tokens=3), grouped=True)
    first, second = (Sequence(tiny.chunk(tiny.prompt(0, 4), request_id=RequestId(g, 0)), g) for g in range(2))
    for sequence in (first, second):
        sequence.extend(np.array([10, 11, 12, 10], np.int32), np.zeros(4, np.float32))
    for sequence in (first, second, first):
        (draft,) = client.draft([sequence], np.array([2], np.int32))
        assert draft.tolist() == [11, 12] and len(client._texts) == 1
    drafts = client.draft([first, second], np.array([2, 2], np.int32))  # more at once than are kept
    assert [draft.tolist() for draft in drafts] == [[11, 12], [11, 12]]


def test_grouped_drafts_from_siblings_and_suffix_does_not() -> None:
    def drafts(grouped: bool) -> list[int]:
        client = DraftClient(SpeculationArgs(max_spec_tokens=3), grouped=grouped)
        first, second = (Sequence(tiny.chunk(tiny.prompt(0, 4), index=i), i) for i in range(2))
        first.extend(np.array([10, 11, 12, 13], np.int32), np.zeros(4, np.float32))
        client.observe(first)
        second.extend(np.array([10], np.int32), np.zeros(1, np.float32))
        (draft,) = client.draft([second], np.array([3], np.int32))
        return draft.tolist()

    assert drafts(grouped=True) == [11, 12, 13]
    assert drafts(grouped=False) == []
