"""Every implementation of the draw says the token that the engine's sampler says of the same logits."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tree_verify import Draws, tree_verify
from kernels_pallas.tree_verify.arg_specs import KIMI_K2, MOONLIGHT, TINY, ArgSpec
from kernels_pallas.tree_verify.noise import fold_in, gumbel
from kernels_pallas.tree_verify.pallas_tpu import tree_verify_pallas_tpu
from kernels_pallas.tree_verify.partials import finish
from kernels_pallas.tree_verify.xla import tree_verify_tiles
from seer_jax.engine.sampler import sample
from tests.quick import quick_jit

NAMES = ("reference", "xla", "xla tiles", "pallas_tpu")


interpreted = functools.partial(tree_verify_pallas_tpu, interpret=True, max_tile=256)


@functools.cache
def program(name, vocab):
    """Jitted implementation: tiles of 128 for "xla tiles", tiles of 256 and interpret mode for "pallas_tpu"."""

    def run(*args):
        if name == "xla tiles":
            return finish(tree_verify_tiles(*args, jnp.int32(0), tile_bytes=0), vocab)
        if name == "pallas_tpu":
            return finish(interpreted(*args, 0, vocab), vocab)
        return tree_verify(*args, implementation=name)

    return quick_jit(run)


def draw(name, hidden, head, keys, positions, temperature) -> Draws:
    """Run one implementation."""
    return program(name, head.shape[1])(*map(jnp.asarray, (hidden, head, keys, positions, temperature)))


engine_program = quick_jit(functools.partial(sample, truncates=False))


def engine_draw(logits, keys, positions, temperature):
    """What the engine's sampler says."""
    rows = len(logits)
    args = (logits, keys, positions, temperature, np.zeros(rows, np.int32), np.ones(rows, np.float32))
    return engine_program(*map(jnp.asarray, args))


def make_rows(rng, rows):
    """Keys, positions and temperatures, some of each kind."""
    return (
        rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
        rng.integers(0, 2**31 - 1, rows).astype(np.int32),
        rng.choice(np.array([0, 0.6, 1], np.float32), rows),
    )


def make_case(spec, seed=0):
    """Random arguments of a shape, logits with a standard deviation of 3."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(3 * rng.standard_normal((spec.rows, spec.width)), spec.dtype)
    head = jnp.asarray(rng.standard_normal((spec.width, spec.vocab)) * spec.width**-0.5, spec.dtype)
    return hidden, head, *make_rows(rng, spec.rows)


def exact_logits(logits):
    """Hidden states and a head whose product is `logits` in every order of summation: each has one term.

    Rows that are all equal may hold infinities and NaNs, others not: zero times these is NaN.
    """
    if not np.isfinite(logits).all():
        assert all(np.array_equal(row, logits[0], equal_nan=True) for row in logits)
        return np.ones((len(logits), 1), np.float32), logits[:1]
    return np.eye(len(logits), dtype=np.float32), logits


def assert_equals_engine(name, logits, keys, positions, temperature):
    logits = np.asarray(logits, np.float32)
    tokens, logprobs = engine_draw(logits, keys, positions, temperature)
    draws = draw(name, *exact_logits(logits), keys, positions, temperature)
    np.testing.assert_array_equal(draws.token_ids, tokens)
    np.testing.assert_allclose(draws.logprobs, logprobs, atol=4e-6)


def test_noise_has_the_bits_of_jax_random():
    keys, positions, _ = make_rows(np.random.default_rng(0), 5)
    wrapped = [jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32") for key in keys]
    folded = [jax.random.fold_in(key, position) for key, position in zip(wrapped, positions, strict=True)]
    key0, key1 = fold_in(jnp.asarray(keys), jnp.asarray(positions))
    expected_words = np.stack([jax.random.key_data(key) for key in folded]).astype(np.uint32)
    np.testing.assert_array_equal(np.stack([key0, key1], axis=1).astype(np.uint32), expected_words)
    # Operation by operation, so that no compiler contracts or reorders the logarithms.
    noise = gumbel(key0[:, None], key1[:, None], jnp.broadcast_to(jnp.arange(1000, dtype=jnp.int32), (5, 1000)))
    expected = np.stack([jax.random.uniform(key, (1000,), minval=np.finfo(np.float32).tiny) for key in folded])
    np.testing.assert_array_equal(noise, -jnp.log(-jnp.log(expected)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", TINY.values(), ids=TINY)
def test_equals_the_reference_and_float64(name, spec):
    case = make_case(spec)
    draws, expected = draw(name, *case), draw("reference", *case)
    hidden, head, _, _, temperature = (np.asarray(x, np.float64) for x in case)
    scaled = hidden @ head / np.where(temperature > 0, temperature, 1)[:, None]
    log_sum_exp = np.log(np.exp(scaled).sum(axis=1))
    np.testing.assert_array_equal(draws.token_ids, expected.token_ids)
    np.testing.assert_allclose(draws.log_sum_exp, log_sum_exp, atol=1e-5)
    chosen = scaled[np.arange(spec.rows), np.asarray(draws.token_ids)]
    np.testing.assert_allclose(draws.logprobs, chosen - log_sum_exp, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_the_engine_says_of_the_same_logits(name):
    rng = np.random.default_rng(1)
    assert_equals_engine(name, 2 * rng.standard_normal((40, 777)), *make_rows(rng, 40))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(1, 127), (35, 129), (17, 700)]),
    seed=st.integers(0, 2**31),
    num_levels=st.sampled_from([1, 3, None]),
    num_masked=st.integers(0, 126),
)
def test_ragged_shapes_ties_and_masked_tokens(shape, seed, num_levels, num_masked):
    """Few levels of logits make ties for the greedy rows; masked logits are -inf."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, num_levels, shape) if num_levels else 3 * rng.standard_normal(shape)
    keyed = make_rows(rng, shape[0])
    logits = logits.astype(np.float32)
    for name in ("xla", "xla tiles", "pallas_tpu"):
        if name != "xla tiles" or shape[1] >= 128:
            assert_equals_engine(name, logits, *keyed)
            masked = np.where(np.arange(shape[1]) < num_masked, -np.inf, logits[:1])
            assert_equals_engine(name, np.tile(masked, (shape[0], 1)), *keyed)


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_lowest_id_across_tiles_and_lanes(name):
    logits = np.zeros((3, 600), np.float32)
    logits[0, [130, 3, 599]] = 2
    logits[1, [599, 258, 257]] = 2
    keys, positions, _ = make_rows(np.random.default_rng(0), 3)
    draws = draw(name, *exact_logits(logits), keys, positions, np.zeros(3, np.float32))
    assert draws.token_ids.tolist() == [3, 257, 0]


@pytest.mark.parametrize("name", NAMES)
def test_infinite_logits_and_nans_as_in_the_engine(name):
    rng = np.random.default_rng(2)
    for masked, at, special in ((399, 0, None), (400, 0, None), (0, 17, np.nan), (9, 300, np.inf)):
        logits = rng.standard_normal((1, 400)).astype(np.float32)
        logits[0, :masked] = -np.inf
        if special is not None:
            logits[0, at] = special
        assert_equals_engine(name, logits, *make_rows(rng, 1))


@pytest.mark.parametrize("wrong", ["position", "key", "first id", "temperature"])
def test_the_comparison_notices_other_noise(wrong):
    hidden, head, keys, positions, temperature = make_case(TINY["several tiles"])
    temperature = np.ones_like(temperature)
    expected = draw("reference", hidden, head, keys, positions, temperature)
    if wrong == "position":
        positions = positions + 1
    elif wrong == "key":
        keys = keys[:, ::-1].copy()
    elif wrong == "temperature":
        temperature = np.full_like(temperature, 0.6)
    args = map(jnp.asarray, (hidden, head, keys, positions, temperature))
    got = tree_verify_tiles(*args, jnp.int32(wrong == "first id"), tile_bytes=0).token_id - (wrong == "first id")
    assert np.mean(np.asarray(got) == np.asarray(expected.token_ids)) < 0.9


@pytest.mark.slow  # The interpreter of TPU memory has crashed the process of a long session.
@pytest.mark.parametrize("vocab", [130, 640])
def test_tpu_kernel_reads_nothing_beyond_the_vocabulary_or_before_it_writes(vocab):
    """In this mode every buffer, and what a block reads out of bounds, is NaN until written."""
    rng = np.random.default_rng(3)
    logits, keyed = rng.standard_normal((11, vocab), np.float32), make_rows(rng, 11)
    mode = pltpu.InterpretParams(uninitialized_memory="nan")
    args = map(jnp.asarray, (*exact_logits(logits), *keyed))
    draws = finish(tree_verify_pallas_tpu(*args, 0, vocab, interpret=mode, max_tile=256), vocab)
    tokens, logprobs = engine_draw(logits, *keyed)
    np.testing.assert_array_equal(draws.token_ids, tokens)
    np.testing.assert_allclose(draws.logprobs, logprobs, atol=4e-6)


def test_several_blocks_of_rows_in_the_tpu_kernel():
    rng = np.random.default_rng(4)
    assert_equals_engine("pallas_tpu", 2 * rng.standard_normal((300, 140)), *make_rows(rng, 300))


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from kernels_pallas.tree_verify import tree_verify
from kernels_pallas.tree_verify.api import IMPLEMENTATIONS
from tests.kernels.test_tree_verify import exact_logits, interpreted, make_rows, quick_jit

rng = np.random.default_rng(5)
logits, keyed = 2 * rng.standard_normal((13, 4 * 203), np.float32), make_rows(rng, 13)
logits[3, [1, 203, 700]] = 50
keyed[2][[2, 3]] = 0
logits[2] = 0  # Ties between shards.
args = tuple(map(jnp.asarray, (*exact_logits(logits), *keyed)))
mesh = jax.make_mesh((4,), ("vocab",), axis_types=(AxisType.Auto,))
expected = tree_verify(*args)
assert expected.token_ids[2] == 0 and expected.token_ids[3] == 1
IMPLEMENTATIONS["pallas_tpu"] = interpreted
for name in ("xla", "reference", "pallas_tpu"):
    sharded = jax.shard_map(
        lambda *a: tree_verify(*a, axis_name="vocab", implementation=name),
        mesh=mesh,
        in_specs=(P(), P(None, "vocab"), P(), P(), P()),
        out_specs=P(),
        check_vma=name != "pallas_tpu",
    )
    compiled = quick_jit(sharded).lower(*args).compile()
    draws = compiled(*args)
    assert (draws.token_ids == expected.token_ids).all(), name
    assert abs(draws.logprobs - expected.logprobs).max() < 4e-6, name
    assert compiled.as_text().count(" all-reduce(") == 1, name
"""


@pytest.mark.slow
def test_shards_of_the_vocabulary_say_what_one_device_says():
    command = [sys.executable, "-c", SHARDED]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_no_array_of_rows_by_vocabulary():
    """Temporaries at a shape that has one tile to 40, by the compiler's own account."""
    rows, width, vocab = 64, 64, 128 * 40
    args = make_case(ArgSpec(rows=rows, width=width, vocab=vocab, dtype="float32"))
    compiled = quick_jit(lambda *a: tree_verify_tiles(*a, jnp.int32(0), tile_bytes=0)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * vocab / 4


def test_bytes_of_large_shapes_are_those_of_the_head():
    assert KIMI_K2["kimi_k2 tp1"].num_bytes == pytest.approx(2.35e9, rel=0.01)
    assert MOONLIGHT["moonlight tp8"].num_bytes == pytest.approx(0.671e9 / 8, rel=0.02)
