"""Speculative decoding in the engine: whatever is drafted, the tokens are those of plain decoding."""

import dataclasses
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest

from seer_jax.config.schema import SpeculationConfig
from seer_jax.core.draft.speculate import DraftBatch
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.core.sequence import Sequence
from seer_jax.core.types import RequestChunk, SamplingParams
from seer_jax.engine.engine import Engine
from tests.engine import tiny
from tests.engine.test_engine import count_compilations

# Cold sampling makes the random model repeat itself, so that drafts are often right.
COLD = SamplingParams(max_tokens=40, temperature=0.3)


def make_engine(
    mode: str = "grouped", max_draft_tokens: int = 4, verify_tile: int = 1, budget: str = "fixed", **changes: object
) -> Engine:
    speculation = SpeculationConfig(
        mode=mode,
        max_draft_tokens=max_draft_tokens,
        min_probability=0.0,
        max_verify_tokens=4 + 2 * max_draft_tokens,
        verify_tile=verify_tile,
        budget=budget,
    )
    return Engine(tiny.MODEL, tiny.params(), dataclasses.replace(tiny.CONFIG, **changes), speculation=speculation)


def siblings(count: int, sampling: SamplingParams = COLD, **fields: object) -> list[RequestChunk]:
    fields = {"max_chunk": sampling.max_tokens, "max_tokens": sampling.max_tokens} | fields
    return [tiny.chunk(tiny.prompt(0, 9), index=i, sampling=sampling, **fields) for i in range(count)]


def run(engine: Engine, chunks: SequenceOf[RequestChunk]) -> dict[int, tuple[list[int], bytes]]:
    for chunk in chunks:
        engine.submit(chunk)
    return {i: (e.token_ids.tolist(), e.logprobs.tobytes()) for i, e in tiny.drain(engine).items()}


@pytest.mark.parametrize(("mode", "verify_tile"), [("suffix", 3), ("grouped", 1), ("grouped_tree", 3)])
@pytest.mark.parametrize(
    "sampling",
    [
        COLD,
        dataclasses.replace(COLD, temperature=0.0),
        dataclasses.replace(COLD, temperature=0.8, top_k=5, top_p=0.9),
        dataclasses.replace(COLD, stop_token_ids=(3, 17, 40)),
    ],
)
def test_tokens_and_logprobs_are_those_of_cacheless_decoding(
    mode: str, verify_tile: int, sampling: SamplingParams
) -> None:
    engine = make_engine(mode, verify_tile=verify_tile)
    chunks = siblings(6, sampling)
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    tiny.check_against_reference(chunks, results)
    status = engine.status()
    assert 0 <= status.num_accepted_tokens <= status.num_drafted_tokens and status.num_drafted_tokens > 0
    assert status.num_generated_tokens == sum(len(event.token_ids) for event in results.values())


@pytest.mark.parametrize("mode", ["suffix", "grouped"])
def test_deterministic_mode_gives_the_same_bits_with_and_without_drafts(mode: str) -> None:
    expected = run(make_engine("off", deterministic=True), siblings(5))
    engine = make_engine(mode, deterministic=True)
    assert run(engine, siblings(5)) == expected
    assert engine.status().num_accepted_tokens > 0


def test_trees_in_deterministic_mode_say_the_same_up_to_rounding() -> None:
    expected = run(make_engine("off", deterministic=True), siblings(5))
    engine = make_engine("grouped_tree", deterministic=True)
    results = run(engine, siblings(5))
    for i, (tokens, logprobs) in results.items():
        assert tokens == expected[i][0]
        np.testing.assert_allclose(np.frombuffer(logprobs, "f4"), np.frombuffer(expected[i][1], "f4"), atol=1e-5)
    assert engine.status().num_accepted_tokens > 0


@pytest.mark.parametrize("mode", ["grouped", "grouped_tree"])
def test_drafts_survive_preemption_and_pauses(mode: str) -> None:
    expected = {i: tiny.reference_decode(chunk)[0] for i, chunk in enumerate(siblings(4))}
    engine = make_engine(mode, num_pages=18)  # 17 usable: each request of 49 tokens needs 13
    results = run(engine, siblings(4, reserve=False))
    assert {i: tokens for i, (tokens, _) in results.items()} == expected
    assert engine.status().num_preemptions > 0 and engine.status().num_accepted_tokens > 0

    engine, got = make_engine(mode), {i: [] for i in range(4)}
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


def tell(engine: Engine, trees: dict[int, list[list[tuple[int, int]]]]) -> None:
    """Make an engine draft, after `n` new tokens of request i, the tree `trees[i][n]` of (token, parent)."""

    def draft(sequences: SequenceOf[Sequence], budgets: np.ndarray, _: np.ndarray) -> DraftBatch:
        batch = DraftBatch.empty(len(sequences), 32)
        for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True)):
            nodes = trees[sequence.chunk.request_id.index][sequence.num_new][:budget]
            batch.num_nodes[i] = len(nodes)
            for j, (token, parent) in enumerate(nodes):
                batch.token_ids[i, j], batch.parents[i, j] = token, parent
        return batch

    engine.speculator.client.draft = draft


def line(tokens: list[int]) -> list[tuple[int, int]]:
    return [(token, i - 1) for i, token in enumerate(tokens)]


def bush(tokens: list[int]) -> list[tuple[int, int]]:
    """The right path, every node of it after two wrong siblings, the first of them with a wrong child."""
    nodes: list[tuple[int, int]] = []
    parent = -1
    for token in tokens:
        wrong = [t % 60 + 2 for t in (token, token + 1)]
        nodes += [(wrong[0], parent), (token, len(nodes)), (wrong[1], parent), (token, parent)]
        parent = len(nodes) - 1
    return nodes


@pytest.mark.parametrize("verify_tile", [1, 4])
def test_right_lines_save_steps_and_wrong_ones_change_nothing(verify_tile: int) -> None:
    chunks = siblings(2)
    expected = {i: tiny.reference_decode(chunk)[0] for i, chunk in enumerate(chunks)}
    right = {i: [line(tokens[n : n + 4]) for n in range(40)] for i, tokens in expected.items()}
    wrong = {i: [line([t % 60 + 2 for t in tokens[n : n + 4]]) for n in range(40)] for i, tokens in expected.items()}
    engine = make_engine(verify_tile=verify_tile)
    for drafts, num_verified, num_accepted in ((right, 2 * 8, 31 + 32), (wrong, None, 0)):
        engine.start_iteration(engine.policy_version)
        tell(engine, drafts)
        results = run(engine, chunks)
        assert {i: tokens for i, (tokens, _) in results.items()} == expected
        status = engine.status()
        assert status.num_accepted_tokens == num_accepted
        # Steps of 4 drafted and 1 drawn; the first request's first token comes from its prefill.
        assert num_verified is None or status.num_verified == num_verified


@pytest.mark.parametrize("verify_tile", [1, 5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_kv_of_a_path_through_a_tree_is_brought_together(verify_tile: int, deterministic: bool) -> None:
    """What follows an accepted path attends to it: wrong or missing KV would change all that comes after."""
    chunks = siblings(2, max_chunk=40, num_reserved_pages=20)
    expected = {i: tiny.reference_decode(chunk) for i, chunk in enumerate(chunks)}
    trees = {i: [bush(tokens[n : n + 3]) for n in range(40)] for i, (tokens, _) in expected.items()}
    engine = make_engine("grouped_tree", max_draft_tokens=12, verify_tile=verify_tile, deterministic=deterministic,
                         max_prefill_tokens=32, max_num_seqs=8)  # fmt: skip
    tell(engine, trees)
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    tiny.check_against_reference(chunks, results)
    status = engine.status()
    # All three are right; only in a small step there is not always room for both trees.
    assert status.num_accepted_tokens >= 1.5 * status.num_verified


def test_nothing_after_a_stop_token_is_accepted() -> None:
    free = tiny.chunk(tiny.prompt(0, 9), sampling=COLD, max_chunk=40, max_tokens=40)
    tokens = tiny.reference_decode(free)[0]
    stop = tokens[6]
    sampling = dataclasses.replace(COLD, stop_token_ids=(stop,))
    engine = make_engine(max_draft_tokens=8)
    tell(engine, {0: [line(tokens[n : n + 8]) for n in range(40)]})
    results = run(engine, [dataclasses.replace(free, sampling=sampling)])
    assert results[0][0] == tokens[: tokens.index(stop) + 1]


def test_new_weights_forget_what_the_old_ones_said() -> None:
    engine = make_engine()
    run(engine, siblings(2))
    engine.start_iteration(1, tiny.params(1))
    assert not engine.speculator.client.held()
    chunks = siblings(2, policy_version=1)
    results = run(engine, chunks)
    for i, chunk in enumerate(chunks):
        assert results[i][0] == tiny.reference_decode(chunk, seed=1)[0]


@pytest.mark.parametrize("budget", ["expected_gain", "mba", "mba_paper"])
def test_a_budget_by_measured_times_compiles_nothing_after_warmup_and_changes_no_token(budget: str) -> None:
    expected = {i: tiny.reference_decode(chunk)[0] for i, chunk in enumerate(siblings(4))}
    engine = make_engine(num_pages=91, budget=budget)
    engine.warmup()
    results: dict[int, tuple[list[int], bytes]] = {}
    assert count_compilations(lambda: results.update(run(engine, siblings(4)))) == 0
    assert {i: tokens for i, (tokens, _) in results.items()} == expected
    assert engine.status().num_generated_tokens == 160


@pytest.mark.parametrize("budget", ["expected_gain", "mba", "mba_paper"])
@pytest.mark.parametrize("verify_tile", [1, 3])
def test_step_times_decide_whether_drafts_are_verified(budget: str, verify_tile: int) -> None:
    """A verification that costs nothing is always worth it, one that costs a second never is."""
    expected = {i: tiny.reference_decode(chunk)[0] for i, chunk in enumerate(siblings(4))}
    engine = make_engine(budget=budget, verify_tile=verify_tile)
    for seconds in (1e-4, 1.0):
        engine.start_iteration(engine.policy_version)
        engine.speculator.use_times(
            MeasuredStepTimes(
                device="", model="", jax="", contexts=(8, 64),
                plain_sizes=(4,), plain_s=((1e-3, 1e-3),), verify_sizes=(64,), verify_s=((seconds, seconds),),
            )
        )  # fmt: skip
        results = run(engine, siblings(4))
        assert {i: tokens for i, (tokens, _) in results.items()} == expected
        assert (engine.status().num_verified > 0) == (seconds < 1e-3)


def test_no_program_is_compiled_after_warmup() -> None:
    engine = make_engine(num_pages=92)
    engine.warmup()
    assert count_compilations(lambda: run(engine, siblings(4))) == 0
    assert engine.status().num_accepted_tokens > 0
