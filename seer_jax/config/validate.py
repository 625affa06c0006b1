"""Checks across settings that need neither checkpoint, data nor devices; those are checked where they are read."""

import math
import string
from pathlib import Path

from seer_jax.config.decode import iterate_settings
from seer_jax.config.schema import EngineConfig, KVPoolConfig, RunConfig
from seer_jax.core.errors import CapacityError, ConfigError

AT_LEAST = {
    "seed": 0,
    "data.heldout_prompts": 0,
    "sampling.max_tokens": 1,
    "sampling.temperature": 0,
    "sampling.top_k": 0,
    "rollout.instances": 1,
    "rollout.min_instances": 0,
    "rollout.num_groups": 1,
    "rollout.group_size": 1,
    "rollout.chunk_size": 1,
    "rollout.starvation_interval": 0,
    "rollout.prefetch_chunks": 0,
    "rollout.max_replacements": 0,
    "engine.max_num_seqs": 1,
    "engine.max_model_len": 2,
    "engine.page_size": 1,
    "engine.num_pages": 2,
    "engine.max_prefill_tokens": 1,
    "engine.prefill_tile": 1,
    "engine.max_steps_per_dispatch": 1,
    "speculation.max_draft_tokens": 1,
    "speculation.min_probability": 0,
    "speculation.priority_factor": 1,
    "speculation.max_verify_tokens": 1,
    "speculation.verify_tile": 1,
    "speculation.draft_servers": 0,
    "speculation.memory_tokens": 0,
    "kvpool.dram_mib": 0,
    "kvpool.disk_mib": 0,
    "kvpool.mooncake_segment_mib": 0,
    "kvpool.mooncake_buffer_mib": 1,
    "chaos.kill_instance": 0,
    "chaos.kill_pool_owner": 0,
    "chaos.corrupt_block": 0,
    "chaos.drop_message": 0,
    "chaos.slow_instance": 1,
    "chaos.seed": 0,
    "sharding.data": 1,
    "sharding.expert": 1,
    "sharding.tensor": 1,
    "train.iterations": 1,
    "train.warmup_updates": 0,
    "train.weight_decay": 0,
    "train.kl_coef": 0,
    "train.num_minibatches": 1,
    "train.tokens_per_microbatch": 1,
    "train.eval_samples": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
}
"""Smallest sensible value of a setting."""

ABOVE_ZERO = (
    "sampling.top_p",
    "rollout.instance_timeout_s",
    "kvpool.mooncake_timeout_s",
    "speculation.group_ttl_s",
    "speculation.sync_interval_s",
    "train.learning_rate",
    "train.adam_eps",
    "train.max_grad_norm",
    "train.clip_low",
    "train.clip_high",
    "train.k15_tau",
    "train.reward_timeout_s",
)
"""Settings that zero makes meaningless."""

MAX_DRAFT_TOKENS = 32
"""Bits of a node's mask of ancestors: `kernels_pallas.mla_attention.MASK_BITS`, which this layer must not import."""
MAX_DROP_SHARE = 0.5
MAX_PORT = 65_535
MIN_MOONCAKE_SEGMENT_MIB = 16
"""`kvpool.mooncake_client.MIN_SEGMENT_BYTES`, which this layer must not import."""
RESERVED_PAGES = 1
"""The first page of each rank takes the writes of padding rows and is never handed out."""


def validate(config: RunConfig, *, training: bool) -> None:
    """Reject what cannot work, before anything heavy starts.

    Args:
        config: The resolved configuration.
        training: Whether samples will be trained on; that asks more of sampling and groups.

    Raises:
        ConfigError: Names the setting, its value and the fix.
        CapacityError: One request can never fit in the pages of an instance, or of one of its ranks.
    """
    _check_ranges(config)
    _check_lengths(config)
    _check_run_dir(config.run_dir)
    if training:
        _check_training(config)


def _check_ranges(config: RunConfig) -> None:
    for path, value in iterate_settings(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(path, f"is {value}", "give a finite number")
        if path in AT_LEAST and value is not None and value < AT_LEAST[path]:
            raise ConfigError(path, f"is {value}", f"give at least {AT_LEAST[path]}")
        if path in ABOVE_ZERO and value <= 0:
            raise ConfigError(path, f"is {value}", "give a number above 0")
    rollout = config.rollout
    if rollout.min_instances > rollout.instances:
        problem = f"is {rollout.min_instances}, above rollout.instances={rollout.instances}"
        raise ConfigError("rollout.min_instances", problem, "give at most that, or 0 to wait for all")
    if rollout.min_instances and rollout.runtime == "local":
        problem = f"is {rollout.min_instances}, but with --runtime local all instances are there at once"
        raise ConfigError("rollout.min_instances", problem, "give 0, or use --runtime ray")
    if config.chaos.drop_message > MAX_DROP_SHARE:
        problem = f"is {config.chaos.drop_message}: too little would arrive in time"
        raise ConfigError("chaos.drop_message", problem, f"a share of at most {MAX_DROP_SHARE}")
    if config.chaos.drop_message and config.rollout.runtime == "local":
        raise ConfigError("chaos.drop_message", "there are no messages with --runtime local", "use --runtime ray")
    if config.kvpool.backend == "ray" and config.rollout.runtime == "local":
        raise ConfigError("kvpool.backend", "is 'ray', but --runtime local has no Ray", "use embedded or --runtime ray")
    _check_mooncake(config.kvpool)
    if config.chaos.kill_pool_owner and config.kvpool.backend != "ray":
        problem = f"there are no owners with kvpool.backend={config.kvpool.backend}"
        raise ConfigError("chaos.kill_pool_owner", problem, "use --kvpool.backend ray")
    if config.kvpool.disk_mib and config.kvpool.directory is None:
        raise ConfigError("kvpool.directory", f"is null, but kvpool.disk_mib={config.kvpool.disk_mib}", "name one")
    if config.kvpool.directory is not None and not config.kvpool.disk_mib:
        raise ConfigError("kvpool.disk_mib", f"is 0, but kvpool.directory={config.kvpool.directory!r}", "give a size")
    if config.chaos.fill_disk and not config.kvpool.disk_mib:
        raise ConfigError("chaos.fill_disk", "there is no disk to fill", "give --kvpool.disk-mib and .directory")
    if config.sampling.top_p > 1:
        raise ConfigError("sampling.top_p", f"is {config.sampling.top_p}", "give a share in (0, 1]; 1 keeps all")
    if config.speculation.min_probability >= 1:
        problem = f"is {config.speculation.min_probability}, which nothing reaches"
        raise ConfigError("speculation.min_probability", problem, "give a number in [0, 1)")
    if config.speculation.max_draft_tokens > MAX_DRAFT_TOKENS:
        problem = f"is {config.speculation.max_draft_tokens}"
        raise ConfigError("speculation.max_draft_tokens", problem, f"at most {MAX_DRAFT_TOKENS}")
    most = config.speculation.max_verify_tokens
    if most is not None and most < config.engine.max_num_seqs:
        problem = f"is {most}, below engine.max_num_seqs={config.engine.max_num_seqs}: no draft would have room"
        raise ConfigError("speculation.max_verify_tokens", problem, "every slot has a newest token; give more, or null")
    profile = config.speculation.profile
    if profile is not None and not Path(profile).expanduser().is_file():
        raise ConfigError("speculation.profile", f"no file {profile!r}", "write one with seer-jax profile")
    if config.train.clip_low >= 1:
        problem = f"is {config.train.clip_low}, so the ratio is never clipped from below"
        raise ConfigError("train.clip_low", problem, "give a number in (0, 1)")


def _check_mooncake(kvpool: KVPoolConfig) -> None:
    host, _, port = kvpool.mooncake_master.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ConfigError("kvpool.mooncake_master", f"is {kvpool.mooncake_master!r}", "give host:port")
    if 0 < kvpool.mooncake_segment_mib < MIN_MOONCAKE_SEGMENT_MIB:
        problem = f"is {kvpool.mooncake_segment_mib}"
        raise ConfigError(
            "kvpool.mooncake_segment_mib", problem, f"give 0, or at least {MIN_MOONCAKE_SEGMENT_MIB}, Mooncake's least"
        )
    names = ("mooncake_master", "mooncake_segment_mib", "mooncake_buffer_mib", "mooncake_timeout_s")
    for name in names if kvpool.backend != "mooncake" else ():
        if getattr(kvpool, name) != getattr(KVPoolConfig, name):
            problem = f"is {getattr(kvpool, name)!r}, but kvpool.backend={kvpool.backend} has no Mooncake"
            raise ConfigError(f"kvpool.{name}", problem, "leave it out, or use --kvpool.backend mooncake")
    if kvpool.backend == "ray" and not kvpool.dram_mib:
        raise ConfigError("kvpool.dram_mib", "is 0, so owners could hold nothing", "give a size")
    if kvpool.backend == "mooncake" and kvpool.disk_mib:
        problem = f"is {kvpool.disk_mib}, but blocks in Mooncake are in memory that its clients lend"
        raise ConfigError("kvpool.disk_mib", problem, "give 0, or another kvpool.backend")


def _check_lengths(config: RunConfig) -> None:
    sampling, engine = config.sampling, config.engine
    if sampling.max_tokens >= engine.max_model_len:
        problem = f"is {sampling.max_tokens}, so no prompt fits in engine.max_model_len={engine.max_model_len} as well"
        fix = f"give at most {engine.max_model_len - 1}, or raise engine.max_model_len"
        raise ConfigError("sampling.max_tokens", problem, fix)
    check_ranks(engine, config.sharding.data)


def check_ranks(engine: EngineConfig, num_ranks: int) -> None:
    """Check that the data-parallel ranks of an engine, each with its share of slots, pages and prefill, can work.

    Raises:
        ConfigError: The ranks' shares are not equal, or too small.
        CapacityError: One request can never fit in the pages of a rank.
    """
    for name in ("max_num_seqs", "num_pages"):
        if getattr(engine, name) % num_ranks:
            problem = f"is {getattr(engine, name)}, which {num_ranks} ranks cannot share equally"
            raise ConfigError(f"engine.{name}", problem, f"give a multiple of sharding.data={num_ranks}")
    of_rank = f" / sharding.data={num_ranks}" if num_ranks > 1 else ""
    if engine.prefill_tile > engine.max_prefill_tokens // num_ranks:
        raise ConfigError(
            "engine.prefill_tile",
            f"is {engine.prefill_tile}, above engine.max_prefill_tokens={engine.max_prefill_tokens}{of_rank}",
            "a tile must fit in one step's prefill",
        )
    needed, usable = math.ceil(engine.max_model_len / engine.page_size), engine.num_pages // num_ranks - RESERVED_PAGES
    if needed > usable:
        raise CapacityError(
            f"engine.num_pages: is {engine.num_pages}{of_rank}, but one request of "
            f"engine.max_model_len={engine.max_model_len} tokens in pages of {engine.page_size}",
            needed,
            usable,
            "pages",
            f"give at least {num_ranks * (needed + RESERVED_PAGES)}, or lower engine.max_model_len; "
            f"{'page 0' if num_ranks == 1 else 'a page of each rank'} is reserved",
        )


def _check_run_dir(template: str) -> None:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError("run_dir", f"{template!r}: {error}", "use {name} and {time} only") from error
    if not template or names - {"name", "time"}:
        raise ConfigError("run_dir", f"cannot be filled in: {template!r}", "use {name} and {time} only")


def _check_training(config: RunConfig) -> None:
    sampling, rollout, train = config.sampling, config.rollout, config.train
    if config.model.expert_dtype != "auto":
        problem = f"is {config.model.expert_dtype!r}, but training updates the experts, in model.dtype"
        raise ConfigError("model.expert_dtype", problem, "give auto; float8 experts are for rollouts")
    if train.replay_routing and not config.engine.expert_ids:
        raise ConfigError("train.replay_routing", "is true, but engine.expert_ids is false", "make both true")
    for path, value, right, needed in (
        ("sampling.top_p", sampling.top_p, sampling.top_p == 1, "1"),
        ("sampling.top_k", sampling.top_k, sampling.top_k == 0, "0"),
        ("sampling.temperature", sampling.temperature, sampling.temperature > 0, "a number above 0"),
    ):
        if not right:
            problem = f"is {value}, but GRPO needs samples of the policy itself"
            raise ConfigError(path, problem, f"training needs {needed}")
    if rollout.group_size < 2:
        problem = f"is {rollout.group_size}, and a response is judged against the others of its group"
        raise ConfigError("rollout.group_size", problem, "training needs at least 2")
    if config.data.heldout_prompts < 1:
        raise ConfigError("data.heldout_prompts", "is 0", "training measures the reward on at least 1")
    num_requests = rollout.num_groups * rollout.group_size
    if train.num_minibatches > num_requests:
        problem = f"is {train.num_minibatches}, above the {num_requests} responses of an iteration"
        raise ConfigError("train.num_minibatches", problem, f"give at most {num_requests}")
    if train.tokens_per_microbatch < config.engine.max_model_len:
        problem = f"is {train.tokens_per_microbatch}, below engine.max_model_len={config.engine.max_model_len}"
        raise ConfigError("train.tokens_per_microbatch", problem, "the longest sequence must fit in a microbatch")
