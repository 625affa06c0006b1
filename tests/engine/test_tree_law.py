"""What a verified tree emits has the law of plain sampling, however the drafts were chosen."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from seer_jax.engine.sampler import sample
from seer_jax.engine.verify import Tokens, walk

VOCAB, DEPTH, NUM_REQUESTS = 4, 3, 6000
RNG = np.random.default_rng(0)
LOGITS = {
    path: RNG.normal(size=VOCAB) * 1.3 for n in range(DEPTH) for path in itertools.product(range(VOCAB), repeat=n)
}
"""A model: logits after every path of tokens."""


def law_of_paths(temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every path of `DEPTH` tokens."""
    law = {}
    for path in itertools.product(range(VOCAB), repeat=DEPTH):
        odds = [np.exp(LOGITS[path[:n]] / temperature) for n in range(DEPTH)]
        law[path] = float(np.prod([o[path[n]] / o.sum() for n, o in enumerate(odds)]))
    return law


def adversarial_trees() -> dict[str, list[tuple[int, ...]]]:
    """Nodes as paths, parents first: the likeliest tokens, the unlikeliest, all, one line, none."""
    by_odds = {path: np.argsort(-logits).tolist() for path, logits in LOGITS.items()}

    def grow(chosen: slice) -> list[tuple[int, ...]]:
        nodes: list[tuple[int, ...]] = [()]
        for path in nodes:
            if len(path) < DEPTH - 1:
                nodes += [(*path, int(token)) for token in by_odds[path][chosen]]
        return nodes[1:]

    return {"likeliest": grow(slice(0, 2)), "unlikeliest": grow(slice(2, 4)), "all": grow(slice(0, 4)),
            "line": grow(slice(1, 2)), "none": []}  # fmt: skip


def emit(tree: list[tuple[int, ...]], temperature: float, *, right_positions: bool = True) -> np.ndarray:
    """Paths of `DEPTH` tokens [requests, DEPTH]: one verified step, then plain steps."""
    nodes = [(), *tree]
    count = len(nodes)
    parents = np.array([-1] + [nodes.index(path[:-1]) for path in tree])
    depths = np.array([len(path) for path in nodes])
    base = np.repeat(np.arange(NUM_REQUESTS) * count, count)
    tile = lambda values: jnp.asarray(np.tile(values, NUM_REQUESTS), jnp.int32)  # noqa: E731
    request = jnp.asarray(np.repeat(np.arange(NUM_REQUESTS), count), jnp.int32)
    parent = jnp.asarray(
        np.where(np.tile(parents, NUM_REQUESTS) < 0, -1, base + np.tile(parents, NUM_REQUESTS)), jnp.int32
    )
    tokens = Tokens(
        token_ids=tile([0] + [path[-1] for path in tree]),
        request=request,
        offset=tile(np.arange(count)),
        depth=tile(depths),
        limit=tile(np.ones(count)),
        mask=jnp.zeros(count * NUM_REQUESTS, jnp.uint32),
        parent=parent,
        column=tile(depths),
    )
    keys = jax.random.key_data(jax.random.split(jax.random.key(7), NUM_REQUESTS))

    def draw(paths: list[tuple[int, ...]], owner: jax.Array, depth: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.asarray(np.array([LOGITS[path] for path in paths]), jnp.float32)
        size = (len(paths),)
        law = jnp.full(size, temperature), jnp.zeros(size, jnp.int32), jnp.ones(size)
        positions = 10 + depth if right_positions else jnp.full(size, 10)
        return sample(logits, keys[owner], positions.astype(jnp.int32), *law, truncates=False)

    drawn, logprobs = draw(nodes * NUM_REQUESTS, request, tokens.depth)
    stops, remaining = jnp.full((NUM_REQUESTS, 1), -1, jnp.int32), jnp.full(NUM_REQUESTS, 99, jnp.int32)
    emitted = walk(drawn, logprobs, tokens, stops, remaining, DEPTH - 1)
    paths = [
        tuple(row[:n]) for row, n in zip(np.asarray(emitted.token_ids).tolist(), emitted.count.tolist(), strict=True)
    ]
    for depth in range(1, DEPTH):
        short = [i for i, path in enumerate(paths) if len(path) == depth]
        if short:
            drawn, _ = draw([paths[i] for i in short], jnp.asarray(short), jnp.full(len(short), depth))
            for i, token in zip(short, drawn.tolist(), strict=True):
                paths[i] = (*paths[i], token)
    return np.array(paths)


def p_value(paths: np.ndarray, temperature: float) -> float:
    """Chi-square test of paths against the law; outcomes expected fewer than 5 times are put together."""
    law = law_of_paths(temperature)
    observed = {path: 0 for path in law}
    for path in map(tuple, paths.tolist()):
        observed[path] += 1
    rare = [path for path, p in law.items() if p * NUM_REQUESTS < 5]
    cells = [([path], law[path]) for path in law if path not in rare] + [(rare, sum(law[path] for path in rare))]
    counts = np.array([sum(observed[path] for path in group) for group, _ in cells if group])
    expected = np.array([p * NUM_REQUESTS for group, p in cells if group])
    return float(stats.chisquare(counts, expected).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", list(adversarial_trees()))
def test_a_verified_tree_samples_the_law_of_the_model(name: str, temperature: float) -> None:
    assert p_value(emit(adversarial_trees()[name], temperature), temperature) > 1e-3


def test_tokens_are_those_without_drafts() -> None:
    plain = emit([], 1.0)
    for tree in adversarial_trees().values():
        np.testing.assert_array_equal(emit(tree, 1.0), plain)


def test_the_test_of_the_law_notices_keys_that_do_not_depend_on_the_position() -> None:
    assert p_value(emit(adversarial_trees()["all"], 1.0, right_positions=False), 1.0) < 1e-6
