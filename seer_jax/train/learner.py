"""The learner: weights and optimizer state, and the update that turns samples into the next weights.

Strictly synchronous: every sample must come from exactly the weights held here.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int16, Int32, Integer

from seer_jax.config.schema import RunConfig, TrainConfig
from seer_jax.core.errors import ConfigError, ProtocolError
from seer_jax.core.types import Sample
from seer_jax.models import decoder
from seer_jax.models.config import DecoderConfig
from seer_jax.models.specs import Params, decoder_specs
from seer_jax.train import losses
from seer_jax.train.advantages import Advantages
from seer_jax.train.batches import Microbatch, make_microbatches

MAX_LOGITS = 2**25
"""Logits that exist at once, in elements (float32: 128 MiB), and as many again while their gradient is taken."""

FROZEN = ("router_bias",)
"""Parameters without gradient or decay: the router's selection bias is balanced in pre-training and kept in RL."""

UNDECAYED = ("embed", "lm_head")
"""Matrices without weight decay, as everything of one dimension."""


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold.

    Attributes:
        params: Master weights, float32 whatever the rollout uses: an update of 1e-4 of a weight is lost in bfloat16.
        opt_state: State of the optimizer.
        policy_version: Number of updates so far; int32 scalar.
    """

    params: Params
    opt_state: Any
    policy_version: Any


class Learner:
    """Holds the train state and updates it from samples.

    Args:
        config: The run.
        model_config: Shape of the decoder.
        params: Initial weights, in the types that the rollout uses. Kept as the reference if `train.kl_coef` > 0. Never
            donated: the caller's arrays stay valid.
        devices: Devices that share the rows of a microbatch; None takes all of this process.

    Attributes:
        state: The train state; assign a restored one to resume.

    Raises:
        ConfigError: If a microbatch cannot give every device a row of the longest sequence, or routing is to be
            replayed and the model has no experts.
    """

    def __init__(
        self,
        config: RunConfig,
        model_config: DecoderConfig,
        params: Params,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._config, self._model_config = config, model_config
        devices = jax.local_devices() if devices is None else devices
        self._num_devices = len(devices)
        if (needed := config.engine.max_model_len * len(devices)) > config.train.tokens_per_microbatch:
            problem = (
                f"is {config.train.tokens_per_microbatch}, too few for a longest row on each of {len(devices)} devices"
            )
            raise ConfigError("train.tokens_per_microbatch", problem, f"give at least {needed}")
        self._expert_ids_shape = model_config.expert_ids_shape if config.train.replay_routing else None
        self._rows, self._replicated = _make_shardings(devices)
        params = self._place(jax.tree.map(jnp.asarray, params), self._replicated)
        self._ref_params = params if config.train.kl_coef > 0 else None
        master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        opt_state = jax.jit(make_optimizer(config.train, master).init)(master)
        self.state = TrainState(params=master, opt_state=opt_state, policy_version=np.zeros((), np.int32))

    @property
    def params(self) -> Params:
        """Current weights in the types that the rollout uses."""
        return _cast(self.state.params, self._config, self._model_config)

    @property
    def policy_version(self) -> int:
        """Number of updates so far."""
        return int(self.state.policy_version)

    def update(self, samples: Sequence[Sample], advantages: Advantages) -> dict[str, float]:
        """Run one iteration's optimizer steps and raise the policy version by one.

        Args:
            samples: The whole iteration, in any order.
            advantages: Of every sample.

        Returns:
            `loss`, `grad_norm` (before clipping): means over minibatches. `entropy` (estimate), `clip_fraction` (not
            `k15`), `ratio_mean`, `kl_old` (rollout to learner), `kl_ref` (if `kl_coef` > 0): means over response
            tokens. `ratio_max`, `sequence_gap_max` (`k15`). `logprob_gap_mean`, `logprob_gap_max`: |rollout's -
            learner's log-probability| in the first minibatch, before any update. `num_microbatches`, `padding_share`,
            `learner_time_s`, `learner_tokens_per_s` (prompts included).

        Raises:
            ProtocolError: If a sample was drawn from other weights than these, or lacks the expert ids to replay.
        """
        for sample in samples:
            if sample.policy_version != self.policy_version:
                raise ProtocolError(
                    f"sample {tuple(sample.request_id)} has policy version {sample.policy_version}, "
                    f"the learner {self.policy_version}"
                )
            if self._expert_ids_shape is not None and sample.expert_ids is None:
                raise ProtocolError(f"sample {tuple(sample.request_id)} has no expert ids to replay")
        start = time.perf_counter()
        order = np.random.default_rng((self._config.seed, self.policy_version)).permutation(len(samples))
        minibatches = [
            self._update_once(samples, advantages, part)
            for part in np.array_split(order, self._config.train.num_minibatches)
        ]
        metrics = _summarise(minibatches)
        elapsed = time.perf_counter() - start
        num_tokens = sum(len(s.prompt_token_ids) + len(s.token_ids) for s in samples)
        self.state = self.state.replace(policy_version=np.asarray(self.policy_version + 1, np.int32))
        return metrics | {"learner_time_s": elapsed, "learner_tokens_per_s": num_tokens / elapsed}

    def _update_once(
        self, samples: Sequence[Sample], advantages: Advantages, part: Integer[np.ndarray, " n"]
    ) -> dict[str, float]:
        config = self._config
        chosen = [samples[i] for i in part]
        row_weights = losses.compute_row_weights(
            config.train.loss,
            np.array([len(s.token_ids) for s in chosen]),
            advantages.weights[part],
            config.sampling.max_tokens,
        )
        microbatches = make_microbatches(
            chosen,
            advantages.values[part],
            row_weights,
            max_length=config.engine.max_model_len,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            row_multiple=self._num_devices,
            expert_ids_shape=self._expert_ids_shape,
        )
        params, grads, metrics = self.state.params, _make_zeros(self.state.params), []
        for batch in microbatches:
            rows = self._place(batch, self._rows)
            grads, sums = _accumulate(
                grads, params, self._ref_params, rows, config=config, model_config=self._model_config
            )
            metrics.append(sums)
        params, opt_state, grad_norm = _apply(params, self.state.opt_state, grads, config=config.train)
        self.state = self.state.replace(params=params, opt_state=opt_state)
        metrics = [{name: float(value) for name, value in sums.items()} for sums in jax.device_get(metrics)]
        return losses.merge_metrics(metrics) | {
            "grad_norm": float(grad_norm),
            "num_microbatches": len(microbatches),
            "num_filled": sum(len(s.prompt_token_ids) + len(s.token_ids) for s in chosen),
            "num_positions": sum(batch.token_ids.size for batch in microbatches),
        }

    def _place(self, tree: Any, sharding: NamedSharding | None) -> Any:
        return tree if sharding is None else jax.device_put(tree, sharding)


def make_optimizer(config: TrainConfig, params: Params) -> optax.GradientTransformation:
    """Build AdamW with linear warm-up and clipping by global norm; frozen parameters get neither step nor state.

    Betas as in Moonlight's training (0.9, 0.95); the first update already has rate learning_rate / warmup_updates.

    Args:
        config: Training settings.
        params: The parameter tree, for the names and shapes that decide freezing and decay.

    Returns:
        The transformation.
    """

    def rate(count: Array) -> Array:
        return config.learning_rate * jnp.minimum(1.0, (count + 1) / max(config.warmup_updates, 1))

    def decays(path: tuple, leaf: Array) -> bool:
        return leaf.ndim > 1 and path[-1].key not in UNDECAYED

    mask = functools.partial(jax.tree_util.tree_map_with_path, decays)
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=config.adam_eps, weight_decay=config.weight_decay, mask=mask)
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "frozen" if path[-1].key in FROZEN else "trained", params)
    trained = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
    return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def compute_loss(
    params: Params,
    ref_params: Params | None,
    batch: Microbatch,
    *,
    config: RunConfig,
    model_config: DecoderConfig,
) -> tuple[Float[Array, ""], losses.Metrics]:
    """Compute a microbatch's part of the loss.

    Args:
        params: Master weights.
        ref_params: Reference weights, or None without KL penalty.
        batch: The rows.
        config: The run: objective, temperature and type of the forward pass.
        model_config: Shape of the decoder.

    Returns:
        Loss sum and metrics.
    """
    train, temperature = config.train, config.sampling.temperature
    params = _cast(params, config, model_config)
    logprobs = compute_logprobs(
        params, model_config, batch.token_ids, temperature, replayed=batch.expert_ids, remat=train.remat
    )
    rows = (logprobs, batch.old_logprobs, batch.mask, batch.advantages, batch.row_weights)
    if train.loss == "k15":
        loss, metrics = losses.squared_loss(*rows, tau=train.k15_tau)
    else:
        loss, metrics = losses.clipped_loss(*rows, clip_low=train.clip_low, clip_high=train.clip_high)
    if ref_params is not None:  # Its own experts: what it says by itself is the reference.
        ref_logprobs = compute_logprobs(ref_params, model_config, batch.token_ids, temperature)
        penalty, kl_metrics = losses.kl_loss(logprobs, ref_logprobs, batch.mask, batch.row_weights, coef=train.kl_coef)
        loss, metrics = loss + penalty, metrics | kl_metrics
    comparison = losses.compare_with_rollout(logprobs, batch.old_logprobs, batch.mask)
    return loss, metrics | comparison | {"loss": loss}


def compute_logprobs(
    params: Params,
    model_config: DecoderConfig,
    token_ids: Int32[Array, "B L"],
    temperature: float,
    *,
    replayed: Int16[Array, "B L moe_layers K"] | None = None,
    remat: bool = False,
) -> Float[Array, "B L"]:
    """Compute the log-probability of every next token under the distribution that rollout draws from.

    The logits of a few positions at a time are formed, and formed again in the backward pass: [B, L, V] never exists.

    Args:
        params: Weights.
        model_config: Shape of the decoder.
        token_ids: Sequences, padded at the end.
        temperature: Divides the logits.
        replayed: Experts to take, see `decoder.forward`.
        remat: Recompute the layers in the backward pass.

    Returns:
        At [b, t] the log-probability of `token_ids[b, t + 1]`; the last column and padding mean nothing.
    """
    hidden = decoder.forward_train(params, model_config, token_ids, replayed=replayed, remat=remat)
    targets = jnp.roll(token_ids, -1, axis=1)

    @jax.checkpoint
    def gather(position: tuple[Float[Array, "B M"], Int32[Array, " B"]]) -> Float[Array, " B"]:
        hidden, targets = position
        logits = decoder.project_logits(params, model_config, hidden) / temperature
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    num_positions = max(1, MAX_LOGITS // (token_ids.shape[0] * model_config.vocab_size))
    by_position = (hidden.swapaxes(0, 1), targets.T)
    return jax.lax.map(gather, by_position, batch_size=min(num_positions, token_ids.shape[1])).T


@jax.jit
def _make_zeros(params: Params) -> Params:
    return jax.tree.map(jnp.zeros_like, params)


@functools.partial(jax.jit, static_argnames=("config", "model_config"), donate_argnames="grads")
def _accumulate(
    grads: Params,
    params: Params,
    ref_params: Params | None,
    batch: Microbatch,
    *,
    config: RunConfig,
    model_config: DecoderConfig,
) -> tuple[Params, losses.Metrics]:
    loss = functools.partial(compute_loss, config=config, model_config=model_config)
    new_grads, metrics = jax.grad(loss, has_aux=True)(params, ref_params, batch)
    return jax.tree.map(jnp.add, grads, new_grads), metrics


# Parameters are not donated: the rollout, or the caller of `Learner`, may still hold them.
@functools.partial(jax.jit, static_argnames="config", donate_argnames=("opt_state", "grads"))
def _apply(
    params: Params, opt_state: optax.OptState, grads: Params, *, config: TrainConfig
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    updates, opt_state = make_optimizer(config, params).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)


def _cast(params: Params, config: RunConfig, model_config: DecoderConfig) -> Params:
    specs = decoder_specs(model_config, jnp.dtype(config.model.dtype))
    return jax.tree.map(lambda p, spec: p.astype(spec.dtype), params, specs)


def _make_shardings(devices: Sequence[jax.Device]) -> tuple[NamedSharding | None, NamedSharding | None]:
    # One device needs no placement, and arrays left as they are share compiled programs with the rest of the process.
    if len(devices) == 1:
        return None, None
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def _summarise(minibatches: list[dict[str, float]]) -> dict[str, float]:
    """Turn sums over the tokens of each minibatch into means per token of the iteration."""
    totals, first = losses.merge_metrics(minibatches), minibatches[0]
    per_token = {"entropy": "entropy", "ratio": "ratio_mean", "kl_old": "kl_old"}
    per_token |= {"num_clipped": "clip_fraction", "kl_ref": "kl_ref"}
    return (
        {name: totals[name] / len(minibatches) for name in ("loss", "grad_norm")}
        | {new: totals[name] / totals["num_tokens"] for name, new in per_token.items() if name in totals}
        | {name: totals[name] for name in ("ratio_max", "sequence_gap_max", "num_microbatches") if name in totals}
        | {
            "logprob_gap_mean": first["logprob_gap"] / first["num_tokens"],
            "logprob_gap_max": first["logprob_gap_max"],
            "padding_share": 1.0 - totals["num_filled"] / totals["num_positions"],
        }
    )
