"""An engine whose KV cache is float8: half the bytes everywhere, one rounding, and the same tokens whatever the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.config.schema import RolloutConfig, SpeculationConfig
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.scheduling import make_policy
from seer_jax.core.types import SamplingParams
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.rollout import RolloutResult, RolloutRunner
from seer_jax.kvpool import EmbeddedKVPool
from seer_jax.models import decoder, mla
from tests.engine import tiny

SAMPLING = SamplingParams(max_tokens=40, temperature=0.3, stop_token_ids=(1, 2), seed=5)
CONFIG = dataclasses.replace(tiny.CONFIG, deterministic=True, kv_dtype="float8_e4m3fn")


def roll_out(
    instances: int = 1, *, config=CONFIG, mode: str = "off", pool: EmbeddedKVPool | None = None, **changes: object
) -> tuple[RolloutResult, list[Engine]]:
    """Three groups of four in short chunks."""
    speculation = SpeculationConfig(mode=mode, max_draft_tokens=4, min_probability=0.0, budget="fixed")
    engines = [
        Engine(
            tiny.MODEL,
            tiny.params(),
            dataclasses.replace(config, **changes),
            speculation=speculation,
            instance_id=i,
            kv_pool=pool,
        )
        for i in range(instances)
    ]
    settings = RolloutConfig(chunk_size=4, prefetch_chunks=0, starvation_interval=2)
    runner = RolloutRunner(LocalCluster(engines, speculation), RolloutDriver(make_policy("seer", settings)))
    result = runner.run(tiny.groups(3, 4, SAMPLING))
    runner.close()
    return result, engines


@pytest.fixture(scope="module")
def expected() -> RolloutResult:
    return roll_out()[0]


def check(result: RolloutResult, expected: RolloutResult) -> None:
    assert result.stats.output_sha256 == expected.stats.output_sha256
    for sample, same in zip(result.samples, expected.samples, strict=True):
        assert sample.logprobs.tobytes() == same.logprobs.tobytes()


def test_log_probabilities_are_those_of_a_forward_pass_that_attends_to_rounded_rows(expected):
    """The whole sequence at once, without a cache, and in float32 but for the rounding."""
    weights = jax.tree.map(jnp.asarray, tiny.params())

    def logits(tokens: np.ndarray, *, is_rounded: bool) -> np.ndarray:
        def attend(_: int, queries, latent, attention_params):
            if is_rounded:
                latent = jnp.clip(latent, -448, 448).astype(jnp.float8_e4m3fn).astype(latent.dtype)
            return mla.expanded_attention(attention_params, tiny.MODEL, queries, latent, len(tokens))

        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        hidden = decoder.forward(weights, tiny.MODEL, jnp.asarray(tokens), positions, attend)
        return np.asarray(decoder.project_logits(weights, tiny.MODEL, hidden))

    differences = {True: [], False: []}
    for sample in expected.samples[:1]:
        prompt = tiny.groups(3, 4, SAMPLING)[sample.request_id.group_id].prompt_token_ids
        tokens = np.concatenate([prompt, sample.token_ids]).astype(np.int32)
        for is_rounded, gaps in differences.items():
            scaled = logits(tokens, is_rounded=is_rounded)[len(prompt) - 1 : -1] / SAMPLING.temperature
            logprobs = np.asarray(jax.nn.log_softmax(scaled))
            gaps.append(np.abs(logprobs[np.arange(len(sample.token_ids)), sample.token_ids] - sample.logprobs).max())
    assert max(differences[True]) < 1e-3 < 0.05 < max(differences[False])


def test_drafts_change_no_bit(expected):
    result, [engine] = roll_out(mode="grouped")
    check(result, expected)
    assert engine.status().num_accepted_tokens > 0


@pytest.mark.parametrize("instances", [1, 2])
def test_kv_that_goes_to_the_pool_or_another_instance_keeps_its_bits(instances, expected, tmp_path):
    """Few pages, so that KV leaves them; the pool of one instance is nearly all on disk."""
    pool = EmbeddedKVPool(1 << 13, directory=tmp_path, max_disk_bytes=1 << 20) if instances == 1 else None
    result, _ = roll_out(instances, num_pages=22, pool=pool)
    check(result, expected)
    assert result.stats.imported_tokens > 0 and result.stats.re_prefilled_tokens == 0
    assert pool is None or result.stats.spilled_bytes > 0


def run_two_chunks(first: Engine, second: Engine):
    """Begin a request on an engine and go on with it on another; returns the KV between."""
    begin = tiny.chunk(tiny.prompt(0, 30), max_chunk=10)
    first.submit(begin)
    [event] = tiny.drain(first).values()
    kv = first.take_kv(begin.request_id)
    tokens = np.concatenate([begin.token_ids, event.token_ids])
    handle = dataclasses.replace(event.kv, ref=kv)
    second.submit(tiny.chunk(tokens, num_prompt=30, chunk_index=1, max_chunk=10, kv=handle))
    tiny.drain(second)
    return kv


def test_kv_of_another_type_is_refused_and_computed_again():
    def make_engine(kv_dtype: str) -> Engine:
        return Engine(tiny.MODEL, tiny.params(), dataclasses.replace(CONFIG, kv_dtype=kv_dtype))

    wide, narrow, other = make_engine("auto"), make_engine("float8_e4m3fn"), make_engine("float8_e4m3fn")
    kv = run_two_chunks(narrow, other)
    assert (kv.pages.dtype, kv.pages.nbytes) == (jnp.float8_e4m3fn, 10 * 2 * 4 * 24)
    assert other.status().num_imported_tokens > 0
    foreign_kv = run_two_chunks(wide, narrow)
    assert (foreign_kv.pages.dtype, foreign_kv.pages.nbytes) == (np.float32, 4 * 10 * 2 * 4 * 24)
    assert narrow.status().num_imported_tokens == 0
