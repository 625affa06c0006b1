"""The GPU kernel says the token that the engine's sampler says, in interpret mode: its arithmetic, not its speed."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # Where it says whether it saw a race.

from kernels_pallas.tree_verify import tree_verify
from kernels_pallas.tree_verify.arg_specs import ArgSpec
from kernels_pallas.tree_verify.pallas_gpu import tree_verify_pallas_gpu
from kernels_pallas.tree_verify.partials import Partials, combine, finish
from tests.kernels.gpu_interpreter import FIND_RACES, HAS_GPU, INTERPRET
from tests.kernels.test_tree_verify import draw, engine_draw, make_case, make_rows
from tests.quick import quick_jit

WIDTH = 64
SPEC = ArgSpec(rows=9, width=64, vocab=576)
"""The tiny model's are in float32, or no multiple of 64."""
pytestmark = pytest.mark.usefixtures("gpu_interpreter")


@functools.cache
def program(vocab_size, interpret=INTERPRET):
    """The kernel with two thread blocks, as a part of a vocabulary of so many tokens."""

    def run(hidden, head, keys, positions, temperature, first_id):
        args = (hidden, head, keys, positions, temperature, first_id, vocab_size)
        return tree_verify_pallas_gpu(*args, interpret=interpret, num_blocks=2, draw_columns=64)

    return quick_jit(run)


def draw_part(hidden, head, keys, positions, temperature, first_id=0, vocab_size=None, **options) -> Partials:
    args = map(jnp.asarray, (hidden, head, keys, positions, temperature, np.int32(first_id)))
    return program(vocab_size or head.shape[1], **options)(*args)


def exact_logits(logits):
    """Hidden states and a head whose product is `logits`: one term each, rows repeat with period `WIDTH`."""
    logits = np.asarray(logits, jnp.bfloat16)
    head = np.zeros((WIDTH, logits.shape[1]), jnp.bfloat16)
    if np.isfinite(logits.astype(np.float32)).all():
        head[: len(logits)] = logits[:WIDTH]
        hidden = np.eye(WIDTH)[np.arange(len(logits)) % WIDTH]
    else:  # Zero times infinity is NaN, so that all rows share the one that has it.
        head[0] = logits[0]
        hidden = np.tile(np.eye(WIDTH)[:1], (len(logits), 1))
    return hidden.astype(jnp.bfloat16), head


def assert_equals_engine(logits, keys, positions, temperature, **options):
    hidden, head = exact_logits(logits)
    of_row = np.argmax(hidden, axis=1)
    tokens, logprobs = engine_draw(head[of_row].astype(np.float32), keys, positions, temperature)
    draws = finish(draw_part(hidden, head, keys, positions, temperature, **options), head.shape[1])
    np.testing.assert_array_equal(draws.token_ids, tokens)
    np.testing.assert_allclose(draws.logprobs, logprobs, atol=4e-6)


def test_equals_the_reference():
    case = make_case(SPEC)
    draws, expected = finish(draw_part(*case), SPEC.vocab), draw("reference", *case)
    np.testing.assert_array_equal(draws.token_ids, expected.token_ids)
    np.testing.assert_allclose(draws.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(draws.log_sum_exp, expected.log_sum_exp, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(
    shape=st.sampled_from([(1, 128), (35, 192), (70, 448)]),
    seed=st.integers(0, 2**31),
    num_levels=st.sampled_from([1, 3, None]),
    num_masked=st.integers(0, 127),
)
def test_ragged_shapes_ties_and_masked_tokens(shape, seed, num_levels, num_masked):
    """Few levels of logits make ties for the greedy rows; masked logits are -inf."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, num_levels, shape) if num_levels else 3 * rng.standard_normal(shape)
    keyed = make_rows(rng, shape[0])
    assert_equals_engine(logits, *keyed)
    assert_equals_engine(
        np.tile(np.where(np.arange(shape[1]) < num_masked, -np.inf, logits[:1]), (shape[0], 1)), *keyed
    )


def test_ties_go_to_the_lowest_id_across_tiles_and_thread_blocks():
    logits = np.zeros((3, 640), np.float32)
    logits[0, [130, 3, 599]] = 2
    logits[1, [599, 258, 257]] = 2
    keys, positions, _ = make_rows(np.random.default_rng(0), 3)
    part = draw_part(*exact_logits(logits), keys, positions, np.zeros(3, np.float32))
    assert part.token_id.tolist() == [3, 257, 0]


def test_infinite_logits_and_nans_as_in_the_engine():
    rng = np.random.default_rng(2)
    for masked, at, special in ((447, 0, None), (448, 0, None), (0, 17, np.nan), (9, 300, np.inf)):
        logits = rng.standard_normal((1, 448)).astype(np.float32)
        logits[0, :masked] = -np.inf
        if special is not None:
            logits[0, at] = special
        assert_equals_engine(logits, *make_rows(rng, 1))


@pytest.mark.parametrize("rows", [pytest.param(200, marks=pytest.mark.slow), 300])
def test_four_warpgroups_and_two_blocks_of_rows(rows):
    rng = np.random.default_rng(4)
    assert_equals_engine(2 * rng.standard_normal((rows, 320)), *make_rows(rng, rows))


def test_parts_of_the_vocabulary_combine_to_the_whole():
    hidden, head, *keyed = make_case(SPEC)
    vocab, first = head.shape[1], 256
    parts = [
        draw_part(hidden, head[:, :first], *keyed, 0, vocab),
        draw_part(hidden, head[:, first:], *keyed, first, vocab),
    ]
    whole = draw("xla", hidden, head, *keyed)
    draws = finish(combine(Partials(*map(jnp.stack, zip(*parts, strict=True)))), vocab)
    np.testing.assert_array_equal(draws.token_ids, whole.token_ids)
    np.testing.assert_allclose(draws.logprobs, whole.logprobs, atol=1e-5)


@pytest.mark.parametrize("wrong", ["position", "key", "first id", "temperature"])
def test_the_comparison_notices_other_noise(wrong):
    hidden, head, keys, positions, temperature = make_case(SPEC)
    temperature = np.ones_like(temperature)
    expected = draw("reference", hidden, head, keys, positions, temperature)
    if wrong == "position":
        positions = positions + 1
    elif wrong == "key":
        keys = keys[:, ::-1].copy()
    elif wrong == "temperature":
        temperature = np.full_like(temperature, 0.6)
    shift = int(wrong == "first id")
    got = draw_part(hidden, head, keys, positions, temperature, shift).token_id - shift
    assert np.mean(np.asarray(got) == np.asarray(expected.token_ids)) < 0.9


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="seen in the interpreter only")
def test_copies_and_warpgroups_do_not_race():
    rng = np.random.default_rng(6)
    assert_equals_engine(2 * rng.standard_normal((70, 448)), *make_rows(rng, 70), interpret=FIND_RACES)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize(
    ("width", "vocab", "dtype", "message"),
    [
        (64, 128, "float32", "float32, not bfloat16"),
        (96, 128, "bfloat16", "width of 96"),
        (64, 136, "bfloat16", "vocabulary of 136"),
    ],
)
def test_shapes_that_the_kernel_cannot_serve_are_refused_by_name(width, vocab, dtype, message):
    keyed = map(jnp.asarray, make_rows(np.random.default_rng(0), 2))
    with pytest.raises(ValueError, match=message):
        tree_verify(jnp.ones((2, width), dtype), jnp.ones((width, vocab), dtype), *keyed, implementation="pallas_gpu")


@pytest.mark.skipif(HAS_GPU, reason="runs there")
def test_the_named_kernel_does_not_become_another_where_there_is_no_gpu():
    case = map(jnp.asarray, make_case(SPEC))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        tree_verify(*case, implementation="pallas_gpu")
