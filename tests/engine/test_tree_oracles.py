"""Logits at every node of a draft tree, through the engine's own step, equal Hugging Face's for the node's path."""

import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.core.draft.speculate import DraftBatch
from seer_jax.core.packing import Run, draft_runs, pack
from seer_jax.core.sequence import Sequence
from seer_jax.core.step_shapes import StepShape
from seer_jax.engine.step import _run_model, _unpack
from seer_jax.models import decoder
from tests.engine import tiny
from tests.models.oracles import PAGE_SIZE, empty_caches, load_case
from tests.quick import quick_jit

PROMPT, DEPTH = 12, 7


def make_sequences(input_ids: np.ndarray, block_tables: np.ndarray) -> list[Sequence]:
    sequences = []
    for i, tokens in enumerate(input_ids):
        sequences.append(Sequence(tiny.chunk(tokens[:PROMPT], index=i, max_chunk=40, max_tokens=40), i))
        sequences[i].pages = block_tables[i].tolist()
    return sequences


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("case", ["moonlight", "k2"])
def test_every_node_has_the_reference_logits_of_its_path(case: str, tile: int) -> None:
    """Two branches whose logits the fixtures hold: the text itself and the greedy continuation; nodes alternate."""
    config, params, oracle = load_case(case)
    text, greedy = oracle["input_ids"][:, PROMPT : PROMPT + DEPTH], oracle["decode_ids"][:, :DEPTH]
    assert (text[:, 0] != greedy[:, 0]).all()
    caches, block_tables = empty_caches(config, 2, PROMPT + 2 * DEPTH + 1)
    sequences = make_sequences(oracle["input_ids"], np.asarray(block_tables))
    size = {"num_pages": block_tables.shape[1], "num_requests": 2}
    prefill = StepShape(num_rows=0, num_tiles=2, tile=PROMPT, **size)
    num_tiles = -(-(2 * DEPTH + 1) // tile)
    rows = (
        {"num_rows": 2 * (2 * DEPTH + 1), "num_tiles": 0} if tile == 1 else {"num_rows": 0, "num_tiles": 2 * num_tiles}
    )
    verify = StepShape(tile=tile, max_depth=DEPTH, has_trees=True, **rows, **size)

    def logits_of(packed, caches, shape):
        requests, first_position, tokens, _ = _unpack(packed, shape)
        run = quick_jit(
            lambda p, c: _run_model(p, c, tokens, first_position, requests.block_tables, config=config, shape=shape)[:2]
        )
        hidden, caches = run(params, caches)
        return np.asarray(decoder.project_logits(params, config, hidden)), caches

    prompts = [Run(sequence=s, start=0, token_ids=s.token_ids[:PROMPT], samples=True) for s in sequences]
    _, caches = logits_of(jnp.asarray(pack([], prompts, prefill, 1)), caches, prefill)

    batch = DraftBatch.empty(2, 2 * DEPTH)
    batch.token_ids[:, 0::2], batch.token_ids[:, 1::2] = text, greedy
    batch.parents[:] = np.arange(2 * DEPTH) - 2
    batch.parents[:, :2] = -1
    runs = draft_runs(sequences, batch, np.full(2, 2 * DEPTH, np.int32))
    assert PAGE_SIZE * len(sequences[0].pages) >= PROMPT + 2 * DEPTH
    packed = pack(runs, [], verify, 1) if tile == 1 else pack([], runs, verify, 1)
    logits, _ = logits_of(jnp.asarray(packed), caches, verify)
    logits = logits.reshape(2, -1, config.vocab_size)[:, : 1 + 2 * DEPTH]
    np.testing.assert_allclose(logits[:, 0], oracle["logits"][:, PROMPT - 1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[:, 1::2], oracle["logits"][:, PROMPT : PROMPT + DEPTH], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[:, 2::2], oracle["decode_logits"][:, 1 : DEPTH + 1], atol=1e-4, rtol=0)
