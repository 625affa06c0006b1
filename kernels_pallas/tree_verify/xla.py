"""Draws in plain XLA: a loop over tiles of the LM head, so that no [rows, vocabulary] array exists.

A tile of the head is copied out before XLA multiplies by it. On a CPU the tile is small enough for the copy to stay in
cache, and a single row takes the whole vocabulary at once; elsewhere tiles are large enough for few trips.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.tree_verify.noise import fold_in, gumbel
from kernels_pallas.tree_verify.partials import Partials, combine

CPU_TILE_BYTES = 2 << 20
"""Bytes of a tile of the head on CPU: 2048 x 256 float32. Of 4 rows, 4 times as much is 1.1x slower, 16 times 2.3x."""
TILE_BYTES = 64 << 20
"""Elsewhere; not measured."""
LANES = 128
"""Tiles have a multiple of this many tokens."""


def tree_verify_xla(hidden, head, keys, positions, temperature, first_id, vocab_size):
    """See `tree_verify`."""
    return jax.lax.platform_dependent(
        hidden,
        head,
        keys,
        positions,
        temperature,
        jnp.int32(first_id),
        # XLA:CPU multiplies a single row where the head lies: no copy is 2.5x faster, and its logits are small.
        cpu=partial(tree_verify_tiles, tile_bytes=CPU_TILE_BYTES if hidden.shape[0] > 1 else head.nbytes),
        default=partial(tree_verify_tiles, tile_bytes=TILE_BYTES),
    )


def tree_verify_tiles(hidden, head, keys, positions, temperature, first_id, *, tile_bytes):
    """Draw from tile after tile, then from the tiles' winners: 16 bytes per row and tile wait for that."""
    width, vocab = head.shape
    fitting = tile_bytes // (width * head.dtype.itemsize)
    tile = vocab if fitting >= vocab else max(fitting // LANES * LANES, LANES)
    is_greedy = (temperature <= 0)[:, None]
    divisor = jnp.where(is_greedy, 1.0, temperature[:, None])
    key0, key1 = (word[:, None] for word in fold_in(keys, positions))

    def draw(columns, start, num_seen):
        """Draw from columns of the head, which start at `start`; the first `num_seen` belong to the tile before."""
        logits = jnp.matmul(hidden, columns, preferred_element_type=jnp.float32) / divisor
        index = jnp.arange(columns.shape[1], dtype=jnp.int32)
        if num_seen is not None:
            logits = jnp.where(index >= num_seen, logits, -jnp.inf)
        noise = gumbel(key0, key1, jnp.broadcast_to(first_id + start + index, logits.shape))
        # XLA:CPU would compute the noise once for the maximum and once to find it.
        logits, scores = jax.lax.optimization_barrier((logits, logits + jnp.where(is_greedy, 0.0, noise)))
        score = jnp.max(scores, axis=1)
        chosen = jnp.min(jnp.where(scores == score[:, None], index, columns.shape[1] - 1), axis=1)
        logit = jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
        return Partials(score, first_id + start + chosen, logit, jax.nn.logsumexp(logits, axis=1))

    if vocab <= tile:
        return draw(head, jnp.int32(0), None)

    def draw_tile(index):
        # The last tile is moved back so that it fits, and leaves out what the one before has seen.
        start = jnp.minimum(index * tile, vocab - tile)
        return draw(jax.lax.dynamic_slice_in_dim(head, start, tile, axis=1), start, index * tile - start)

    return combine(jax.lax.map(draw_tile, jnp.arange(-(-vocab // tile), dtype=jnp.int32)))
