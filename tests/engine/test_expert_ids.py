"""Expert ids of response tokens: those of the plain forward pass, wherever the engine computed the token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.config.schema import EngineConfig, RolloutConfig, RunConfig, SpeculationConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import ConfigError
from seer_jax.core.events import ChunkFinished
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import RequestChunk, RequestId, SamplingParams
from seer_jax.engine.engine import Engine
from seer_jax.engine.factory import build_local_cluster
from seer_jax.engine.rollout import RolloutRunner
from seer_jax.models import decoder, mla
from seer_jax.models.specs import Params, decoder_specs, init_params
from tests.engine import tiny
from tests.engine.test_engine import count_compilations
from tests.engine.test_speculation import COLD, bush, tell

# 3 layers of 3 ids each: an odd number of halves of a word.
MODEL = dataclasses.replace(tiny.MODEL, num_hidden_layers=4, n_routed_experts=8, num_experts_per_tok=3)
CONFIG = dataclasses.replace(tiny.CONFIG, expert_ids=True)


@functools.cache
def params() -> Params:
    weights = init_params(jax.random.key(7), decoder_specs(MODEL, jnp.float32))
    return jax.device_get(weights | {"lm_head": 4 * weights["lm_head"]})


def make_engine(mode: str = "off", verify_tile: int = 1, max_draft_tokens: int = 4, **changes: object) -> Engine:
    speculation = SpeculationConfig(
        mode=mode,
        max_draft_tokens=max_draft_tokens,
        min_probability=0.0,
        max_verify_tokens=4 + 2 * max_draft_tokens,
        verify_tile=verify_tile,
        budget="fixed",
    )
    instance_id = changes.pop("instance_id", 0)
    config = dataclasses.replace(CONFIG, **changes)
    return Engine(MODEL, params(), config, speculation=speculation, instance_id=instance_id)


@jax.jit
def _all_experts(weights: Params, token_ids: jax.Array) -> jax.Array:
    noted: list[jax.Array] = []

    def attend(_: int, queries: mla.MLAQueries, latent: jax.Array, attn: Params) -> jax.Array:
        return mla.expanded_attention(attn, MODEL, queries, latent, len(token_ids))

    decoder.forward(weights, MODEL, token_ids, jnp.arange(len(token_ids)), attend, note_experts=noted.append)
    return jnp.stack(noted, axis=1)


def reference_experts(prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Sorted experts [len(response), 3, 3] of the plain forward pass over the whole text."""
    text = np.zeros(CONFIG.max_model_len, np.int32)
    text[: len(prompt) + len(response)] = np.concatenate([prompt, response])
    start = len(prompt) - 1
    return np.sort(np.asarray(_all_experts(params(), text))[start : start + len(response)], axis=-1)


def check(prompt: np.ndarray, response: np.ndarray, expert_ids: np.ndarray) -> None:
    """Every row is that of the plain forward pass, and rows differ enough for a wrong one to be seen."""
    assert expert_ids.dtype == np.int16 and expert_ids.shape == (len(response), 3, 3)
    expected = reference_experts(prompt, response)
    np.testing.assert_array_equal(np.sort(expert_ids, axis=-1), expected)
    if len(response) > 10:
        for wrong in (np.roll(expected, 1, axis=0), expected[:, ::-1]):
            assert (wrong != expected).any(axis=(1, 2)).mean() > 0.5


def siblings(count: int, **fields: object) -> list[RequestChunk]:
    fields = {"max_chunk": 40, "max_tokens": 40} | fields
    return [tiny.chunk(tiny.prompt(0, 9), index=i, sampling=COLD, **fields) for i in range(count)]


def run(engine: Engine, chunks: Sequence[RequestChunk]) -> Mapping[int, ChunkFinished]:
    for chunk in chunks:
        engine.submit(chunk)
    return tiny.drain(engine)


@pytest.mark.parametrize(("mode", "verify_tile"), [("off", 1), ("grouped", 1), ("grouped_tree", 3)])
def test_ids_are_those_of_the_plain_forward_pass(mode: str, verify_tile: int) -> None:
    """More requests than slots, and prompts in several slices: mixed, decode and verify steps all draw tokens."""
    engine = make_engine(mode, verify_tile)
    chunks = [*siblings(5), *(tiny.chunk(tiny.prompt(i, 27), index=i, sampling=COLD, max_tokens=20) for i in (5, 6))]
    for index, event in run(engine, chunks).items():
        check(chunks[index].token_ids, event.token_ids, event.expert_ids)
    assert (engine.status().num_accepted_tokens > 0) == (mode != "off")


@pytest.mark.parametrize("mode", ["off", "grouped_tree"])
def test_preempted_requests_keep_theirs(mode: str) -> None:
    engine = make_engine(mode, num_pages=18)  # 17 usable: each request of 49 tokens needs 13
    chunks = siblings(4, reserve=False)
    for index, event in run(engine, chunks).items():
        check(chunks[index].token_ids, event.token_ids, event.expert_ids)
    assert engine.status().num_preemptions > 0


def test_every_chunk_has_its_own_wherever_it_runs_and_whatever_became_of_its_kv() -> None:
    engines, prompt = [make_engine(instance_id=i) for i in range(2)], tiny.prompt(0, 9)
    known, kv, got = prompt, None, []
    for index in range(6):
        engine, other = engines[index % 2], engines[1 - index % 2]
        if kv is not None:  # Every third time it is lost.
            kv = dataclasses.replace(kv, ref=None if index % 3 == 0 else other.take_kv(RequestId(0, 0)))
        (event,) = run(engine, [tiny.chunk(known, num_prompt=9, chunk_index=index, max_chunk=5, max_tokens=30, kv=kv)])\
            .values()  # fmt: skip
        known, kv = np.concatenate([known, event.token_ids]), event.kv
        got.append(event.expert_ids)
    check(prompt, known[9:], np.concatenate(got))


@pytest.mark.parametrize("verify_tile", [1, 5])
def test_of_a_tree_only_the_accepted_path_counts_wherever_it_lies(verify_tile: int) -> None:
    chunks = siblings(2, num_reserved_pages=20)
    said = {i: event.token_ids.tolist() for i, event in run(make_engine(), chunks).items()}
    trees = {i: [bush(tokens[n : n + 3]) for n in range(40)] for i, tokens in said.items()}
    engine = make_engine("grouped_tree", verify_tile, 12, max_prefill_tokens=32, max_num_seqs=8)
    tell(engine, trees)
    for index, event in run(engine, chunks).items():
        assert event.token_ids.tolist() == said[index]
        check(chunks[index].token_ids, event.token_ids, event.expert_ids)
    status = engine.status()
    assert status.num_accepted_tokens >= 1.5 * status.num_verified


def test_samples_of_a_rollout_have_them_for_every_token() -> None:
    config = RunConfig(
        engine=dataclasses.replace(CONFIG, num_pages=64),
        rollout=RolloutConfig(instances=2, chunk_size=3, prefetch_chunks=1),
    )
    sampling = SamplingParams(max_tokens=40, stop_token_ids=(1, 2), seed=5)
    runner = RolloutRunner(
        build_local_cluster(config, MODEL, params()), RolloutDriver(make_policy("seer", config.rollout))
    )
    samples = runner.run(tiny.groups(3, 3, sampling)).samples
    assert max(sample.num_chunks for sample in samples) > 5
    for sample in samples:
        check(sample.prompt_token_ids, sample.token_ids, sample.expert_ids)


def test_asking_for_them_changes_no_token_and_compiles_nothing_after_warmup() -> None:
    plain = run(make_engine(deterministic=True, expert_ids=False), siblings(3))
    engine = make_engine(deterministic=True)
    engine.warmup()
    results: dict[int, ChunkFinished] = {}
    assert count_compilations(lambda: results.update(run(engine, siblings(3)))) == 0
    for index, event in plain.items():
        assert event.expert_ids is None and results[index].expert_ids is not None
        assert results[index].token_ids.tolist() == event.token_ids.tolist()
        assert results[index].logprobs.tobytes() == event.logprobs.tobytes()


def test_a_model_without_experts_cannot_return_any() -> None:
    dense = dataclasses.replace(tiny.MODEL, first_k_dense_replace=2)
    weights = init_params(jax.random.key(0), decoder_specs(dense, jnp.float32))
    with pytest.raises(ConfigError, match=r"engine\.expert_ids: the model has none") as info:
        Engine(dense, weights, CONFIG)
    assert info.value.path == "engine.expert_ids"
    Engine(dense, weights, EngineConfig(num_pages=4, max_model_len=16))
    many = dataclasses.replace(tiny.MODEL, n_routed_experts=2**15 + 1)
    with pytest.raises(ConfigError, match="32769 experts"):
        _ = many.expert_ids_shape
