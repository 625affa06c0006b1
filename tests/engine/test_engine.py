"""The engine: exact tokens whatever the batch, chunking, migration or preemption; capacity; protocol."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.core.errors import ProtocolError
from seer_jax.core.types import RequestId, SamplingParams
from seer_jax.engine import kv_transfer
from seer_jax.engine.engine import Engine
from seer_jax.engine.kv_transfer import KVTransfer
from tests.engine import tiny


def make_engine(**changes: object) -> Engine:
    return Engine(tiny.MODEL, tiny.params(), dataclasses.replace(tiny.CONFIG, **changes))


def count_compilations(run: Callable[[], object]) -> int:
    """Programs that XLA compiles while `run` runs."""
    durations: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        durations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    run()
    return durations.count("/jax/core/compile/backend_compile_duration")


def test_batched_paged_decoding_gives_the_tokens_and_logprobs_of_cacheless_decoding() -> None:
    engine = make_engine()
    chunks = [tiny.chunk(tiny.prompt(i, 3 + 6 * i), index=i) for i in range(7)]  # more than slots, longer than a tile
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    tiny.check_against_reference(chunks, results)
    assert {event.finish_reason for event in results.values()} == {"length"}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=20, temperature=0.0),
        SamplingParams(max_tokens=20, temperature=0.7, top_k=4),
        SamplingParams(max_tokens=20, top_p=0.6, seed=3),
        SamplingParams(max_tokens=20, stop_token_ids=tuple(range(4))),
    ],
)
def test_sampling_parameters_are_honoured(sampling: SamplingParams) -> None:
    engine = make_engine()
    chunks = [tiny.chunk(tiny.prompt(i, 5), index=i, sampling=sampling) for i in range(4)]
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    tiny.check_against_reference(chunks, results)
    for event in results.values():
        stopped = event.token_ids[-1] in sampling.stop_token_ids
        assert event.finish_reason == ("stop" if stopped else "length")
        assert not any(token in sampling.stop_token_ids for token in event.token_ids[:-1])


def test_chunk_continues_on_another_instance_without_prefill() -> None:
    whole = tiny.chunk(tiny.prompt(0, 9))
    tokens, _ = tiny.reference_decode(whole)
    engines = [Engine(tiny.MODEL, tiny.params(), tiny.CONFIG, instance_id=i) for i in range(2)]
    known, kv, got = whole.token_ids, None, []
    for index in range(4):
        engine, other = engines[index % 2], engines[1 - index % 2]
        if kv is not None:
            assert kv.ref == other.info.instance_id
            kv = dataclasses.replace(kv, ref=other.take_kv(whole.request_id))
        engine.submit(tiny.chunk(known, num_prompt=9, chunk_index=index, max_chunk=5, kv=kv))
        (event,) = tiny.drain(engine).values()
        got += event.token_ids.tolist()
        known, kv = np.concatenate([known, event.token_ids]), event.kv
        assert (kv is None) == (event.finish_reason != "chunk")
    assert got == tokens
    assert engines[0].status().num_prefilled_tokens == 9
    assert engines[1].status().num_prefilled_tokens == 0


def test_kv_goes_through_pinned_memory_where_that_is_not_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = KVTransfer(8)
    caches = [jnp.arange(10 * 4 * 6, dtype=jnp.float32).reshape(10, 4, 6) + layer for layer in range(2)]
    plain = transfer.export_pages(caches, [3, 1, 7, 2, 5])
    monkeypatch.setattr(kv_transfer, "HOST_PLATFORMS", ())
    staged = transfer.export_pages(caches, [3, 1, 7, 2, 5])
    assert (plain.sharding.memory_kind, staged.sharding.memory_kind) == ("device", "pinned_host")
    assert np.asarray(staged).tobytes() == np.asarray(plain).tobytes()
    test_chunk_continues_on_another_instance_without_prefill()


def test_chunk_continues_where_it_was_on_the_pages_it_left() -> None:
    whole = tiny.chunk(tiny.prompt(0, 9))
    tokens, _ = tiny.reference_decode(whole)
    engine = make_engine()
    engine.submit(tiny.chunk(whole.token_ids, max_chunk=6))
    (first,) = tiny.drain(engine).values()
    assert engine.status().num_free_pages == engine.info.num_total_pages  # parked KV is in nobody's way
    known = np.concatenate([whole.token_ids, first.token_ids])
    engine.submit(tiny.chunk(known, num_prompt=9, chunk_index=1, kv=first.kv))
    (second,) = tiny.drain(engine).values()
    assert [*first.token_ids, *second.token_ids] == tokens
    assert engine.status().num_prefilled_tokens == 9 and engine.take_kv(whole.request_id) is None


def test_parked_kv_whose_pages_are_needed_waits_on_the_host() -> None:
    requests = [tiny.chunk(tiny.prompt(i, 9), index=i, max_chunk=6) for i in range(2)]
    engine = make_engine(num_pages=5)  # 4 usable: one request fills them
    engine.submit(requests[0])
    (first,) = tiny.drain(engine).values()
    engine.submit(requests[1])
    tiny.drain(engine)
    known = np.concatenate([requests[0].token_ids, first.token_ids])
    engine.submit(tiny.chunk(known, num_prompt=9, chunk_index=1, max_chunk=1, kv=first.kv))
    (second,) = tiny.drain(engine).values()
    tokens, _ = tiny.reference_decode(dataclasses.replace(requests[0], max_chunk_tokens=7))
    assert [*first.token_ids, *second.token_ids] == tokens
    assert engine.status().num_prefilled_tokens == 2 * 9
    kv = engine.take_kv(requests[1].request_id)  # evicted in its turn
    assert kv is not None and kv.num_tokens == 9 + 6 - 1


def test_kv_that_reaches_further_than_the_known_tokens_is_cut() -> None:
    """The instance went on, but its last report was lost: the chunk is run again from the tokens that arrived."""
    whole = tiny.chunk(tiny.prompt(0, 9))
    tokens, _ = tiny.reference_decode(whole)
    first, second = make_engine(), make_engine()
    first.submit(tiny.chunk(whole.token_ids, max_chunk=6))
    (event,) = tiny.drain(first).values()
    again = tiny.chunk(whole.token_ids, max_chunk=6, chunk_index=1, kv=event.kv)
    moved = dataclasses.replace(again, kv=dataclasses.replace(event.kv, ref=first.take_kv(whole.request_id)))
    second.submit(moved)
    (event,) = tiny.drain(second).values()
    assert event.token_ids.tolist() == tokens[:6] and second.status().num_imported_tokens == 8
    second.submit(again)  # from what is parked there
    (event,) = tiny.drain(second).values()
    assert event.token_ids.tolist() == tokens[:6] and second.status().num_prefilled_tokens == 0


def test_kv_is_taken_once_and_not_while_the_request_runs() -> None:
    whole = tiny.chunk(tiny.prompt(0, 9))
    engine = make_engine()
    engine.submit(tiny.chunk(whole.token_ids, max_chunk=6))
    (event,) = tiny.drain(engine).values()
    known = np.concatenate([whole.token_ids, event.token_ids])
    engine.submit(tiny.chunk(known, num_prompt=9, chunk_index=1, max_chunk=12, kv=event.kv))
    engine.step()  # 8 steps at most
    assert engine.take_kv(whole.request_id) is None
    (event,) = tiny.drain(engine).values()
    assert event.token_ids.tolist() == tiny.reference_decode(whole)[0][6:18]
    assert engine.take_kv(whole.request_id) is not None and engine.take_kv(whole.request_id) is None


def test_missing_kv_costs_a_prefill_and_no_token() -> None:
    whole = tiny.chunk(tiny.prompt(0, 9))
    tokens, _ = tiny.reference_decode(whole)
    other, engine = make_engine(), make_engine()
    other.submit(tiny.chunk(whole.token_ids, max_chunk=6))
    (first,) = tiny.drain(other).values()
    known = np.concatenate([whole.token_ids, first.token_ids])
    engine.submit(tiny.chunk(known, num_prompt=9, chunk_index=1, kv=dataclasses.replace(first.kv, ref=None)))
    (second,) = tiny.drain(engine).values()
    assert [*first.token_ids, *second.token_ids] == tokens
    assert engine.status().num_reprefilled_tokens == 9 + 6 - 1


def test_kv_of_another_layout_costs_a_prefill_and_no_token() -> None:
    request = tiny.chunk(tiny.prompt(0, 9))
    other = make_engine(page_size=8)
    other.submit(tiny.chunk(request.token_ids, max_chunk=6))
    (first,) = tiny.drain(other).values()
    engine = make_engine()
    kv = dataclasses.replace(first.kv, ref=other.take_kv(request.request_id))
    engine.submit(tiny.chunk(np.concatenate([request.token_ids, first.token_ids]), num_prompt=9, kv=kv))
    (second,) = tiny.drain(engine).values()
    assert [*first.token_ids, *second.token_ids] == tiny.reference_decode(request)[0]
    assert engine.status().num_prefilled_tokens == 9 + 6


def test_kv_of_older_weights_is_never_used() -> None:
    engine = make_engine()
    engine.submit(tiny.chunk(tiny.prompt(0, 9), max_chunk=6))
    (first,) = tiny.drain(engine).values()
    old = engine.take_kv(first.request_id)
    engine.start_iteration(1, tiny.params(1))
    known = np.concatenate([tiny.prompt(0, 9), first.token_ids])
    kv = dataclasses.replace(first.kv, ref=old)
    request = tiny.chunk(known, num_prompt=9, chunk_index=1, kv=kv, policy_version=1)
    engine.submit(request)
    (second,) = tiny.drain(engine).values()
    tokens, _ = tiny.reference_decode(request, seed=1)
    assert second.token_ids.tolist() == tokens
    assert engine.status().num_prefilled_tokens == len(known)


def test_kv_parked_or_saved_before_an_update_is_dropped() -> None:
    engine = make_engine(num_pages=5)  # 4 usable: the second request evicts the first's KV to the host
    for i in range(2):
        engine.submit(tiny.chunk(tiny.prompt(i, 9), index=i, max_chunk=6))
        tiny.drain(engine)
    engine.start_iteration(1, tiny.params(1))
    assert [engine.take_kv(RequestId(0, i)) for i in range(2)] == [None, None]
    assert engine.status().num_free_pages == 4


def test_preempted_requests_return_the_same_tokens() -> None:
    engine = make_engine(num_pages=13)  # 12 usable: two requests of 29 tokens need 16
    chunks = [tiny.chunk(tiny.prompt(i, 9), index=i, reserve=False) for i in range(4)]
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    assert engine.status().num_preemptions > 0
    for i, chunk in enumerate(chunks):
        assert results[i].token_ids.tolist() == tiny.reference_decode(chunk)[0]


def test_deterministic_mode_is_bitwise_independent_of_batch_chunking_and_preemption() -> None:
    alone = make_engine(deterministic=True)
    chunks = [tiny.chunk(tiny.prompt(i, 4 + 3 * i), index=i) for i in range(5)]
    expected = {}
    for chunk in chunks:
        alone.submit(chunk)
        expected |= tiny.drain(alone)
    crowded = make_engine(deterministic=True, num_pages=16)
    for chunk in chunks:
        crowded.submit(dataclasses.replace(chunk, num_reserved_pages=0))
    results = tiny.drain(crowded)
    assert crowded.status().num_preemptions > 0
    for i in range(5):
        assert results[i].token_ids.tolist() == expected[i].token_ids.tolist()
        assert results[i].logprobs.tobytes() == expected[i].logprobs.tobytes()


def test_siblings_copy_the_prompt_of_the_first_and_return_the_tokens_of_cacheless_decoding() -> None:
    engine = make_engine()
    prompt = tiny.prompt(0, 27)  # longer than a step's prefill budget, and its last page is partial
    chunks = [tiny.chunk(prompt, index=i) for i in range(6)]  # more than slots: the last two find the prompt computed
    for chunk in chunks:
        engine.submit(chunk)
    results = tiny.drain(engine)
    tiny.check_against_reference(chunks, results)
    status = engine.status()
    # The first is a step ahead and ends a step before the others, so the fifth finds somebody to copy from.
    assert status.num_prefilled_tokens == 27 and status.num_shared_tokens == 5 * 26


def test_copied_prompt_gives_the_same_bits_in_deterministic_mode() -> None:
    alone, crowded = make_engine(deterministic=True), make_engine(deterministic=True)
    chunks = [tiny.chunk(tiny.prompt(0, 11), index=i) for i in range(3)]
    expected = {}
    for chunk in chunks:
        alone.submit(chunk)
        expected |= tiny.drain(alone)
        crowded.submit(chunk)
    results = tiny.drain(crowded)
    assert alone.status().num_shared_tokens == 0 and crowded.status().num_shared_tokens == 2 * 10
    for i in range(3):
        assert results[i].token_ids.tolist() == expected[i].token_ids.tolist()
        assert results[i].logprobs.tobytes() == expected[i].logprobs.tobytes()


def test_no_program_is_compiled_after_warmup() -> None:
    # A size that no other test compiles, so that the count is known to see compilations at all.
    engine = make_engine(max_prefill_tokens=32, num_pages=90)
    assert count_compilations(engine.warmup) >= 4

    def use_everything() -> None:
        prompts = [tiny.prompt(i // 2, 2 + 8 * (i // 2)) for i in range(14)]
        for i, prompt in enumerate(prompts):
            engine.submit(tiny.chunk(prompt, index=i, max_chunk=7))
        paused = tiny.drain(engine)
        assert engine.status().num_shared_tokens > 0
        for i, event in paused.items():
            known = np.concatenate([prompts[i], event.token_ids])
            engine.submit(tiny.chunk(known, num_prompt=len(prompts[i]), index=i, chunk_index=1, kv=event.kv))
        tiny.drain(engine)

    assert count_compilations(use_everything) == 0


def test_chunk_of_another_policy_version_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(ProtocolError, match="policy version 3"):
        engine.submit(tiny.chunk(tiny.prompt(0, 4), policy_version=3))


def test_weights_update_while_chunks_run_is_refused() -> None:
    engine = make_engine()
    engine.submit(tiny.chunk(tiny.prompt(0, 4)))
    with pytest.raises(ProtocolError, match="chunks run"):
        engine.start_iteration(1, tiny.params(1))
