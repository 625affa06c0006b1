"""Draws from whole float32 logits, with `jax.random` itself."""

import jax
import jax.numpy as jnp

from kernels_pallas.tree_verify.partials import Partials


def tree_verify_reference(hidden, head, keys, positions, temperature, first_id, vocab_size):
    """See `tree_verify`; the noise of the whole vocabulary is drawn and the part's cut out of it."""

    def draw(row, key, position, temperature):
        logits = row @ head.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        noise = jax.lax.dynamic_slice(jax.random.gumbel(key, (vocab_size,)), (first_id,), logits.shape)
        scores = logits + jnp.where(temperature > 0, noise, 0.0)
        index = jnp.argmax(scores)
        return Partials(scores[index], first_id + index.astype(jnp.int32), logits[index], jax.nn.logsumexp(logits))

    return jax.vmap(draw)(hidden.astype(jnp.float32), keys, positions, temperature)
