"""Every setting of a run, declared once. A field's docstring is its help text on the command line.

Shapes of a model come from the checkpoint's own `config.json` (`seer_jax.models.config`), not from here.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the weights come from."""

    path: str = "preset:model/tiny_math"
    """Directory with Hugging Face `config.json` and `*.safetensors`; `preset:` names one that ships with seer_jax."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights, activations and, by default, KV cache. float32 is 4x faster than bfloat16 on CPU."""
    expert_dtype: Literal["auto", "checkpoint"] = "auto"
    """Type of the routed experts. `auto`: `dtype`. `checkpoint`: float8 with a scale per 128 x 128, as the checkpoint
    has them. For rollouts only: a learner updates no float8."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and their reward."""

    task: str = "chain_sum"
    """A built-in task (generates its prompts from `seed`), or `jsonl` to read `path`."""
    path: str | None = None
    """JSONL file for `task: jsonl`: a line has `prompt` (text) or `prompt_token_ids`, plus what the reward needs."""
    reward: str | None = None
    """`package.module:function(prompt: str, response: str, record: dict) -> float`; None takes the task's own. The
    record is the line read, plus `prompt_token_ids` and `response_token_ids`."""
    heldout_prompts: int = 96
    """Prompts kept for measuring the reward before and after; never trained on."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled."""

    max_tokens: int = 512
    """Limit of generated tokens of a response."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass kept; training needs 1."""
    top_k: int = 0
    """Likeliest tokens kept, 0 = all; training needs 0."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, 4 at most; none takes the model's `eos_token_id`."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Scheduling of one rollout over the instances."""

    policy: Literal["seer", "divided", "group_round_robin"] = "seer"
    """`seer`: divided rollout, probes, longest first. `divided`: chunks in order of submission. `group_round_robin`:
    veRL's whole groups, may be preempted. (`oracle` and `streamrl_oracle` know true lengths: for simulation only.)"""
    runtime: Literal["ray", "local"] = "ray"
    """`ray`: one actor process per instance. `local`: all instances in this process, for debugging."""
    instances: int = 2
    """Number of instances (model replicas)."""
    min_instances: int = 0
    """Instances that must be ready for the first rollout to begin; the others join in the middle of it, as soon as Ray
    has a place for them. 0 = all."""
    num_groups: int = 16
    """Prompts per iteration."""
    group_size: int = 8
    """Responses per prompt (G)."""
    chunk_size: int = 128
    """Tokens that a request may generate before it goes back to the buffer (8k at the paper's scale)."""
    starvation_interval: int = 64
    """Every so many scheduling decisions one goes to the most underserved group; 0 = never."""
    prefetch_chunks: int = 8
    """Chunks that may queue at an instance, so that free slots and pages are refilled without asking the controller."""
    share_prompts: bool = True
    """Whether requests of a group that run on one instance have the KV pages of their prompt in common, so that a
    reservation counts them once. Not in the paper."""
    length_estimator: Literal["group_max", "posterior"] = "group_max"
    """What `seer` orders by. `group_max`: the longest finished sibling. `posterior`: a Bayesian estimate from finished
    siblings, from how far the others have got and from the request's own progress; not in the paper."""
    instance_timeout_s: float = 120.0
    """An instance that has work and gives no sign of life for so long is taken for dead, and its requests go on
    elsewhere. More than its longest compilation and its longest step."""
    max_replacements: int = 16
    """Instances that may be started in each rollout in place of lost ones; 0 = the others do the work."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One inference engine."""

    max_num_seqs: int = 16
    """Slots: requests decoded together, on all ranks (`sharding.data`)."""
    max_model_len: int = 1024
    """Longest prompt plus response, in tokens."""
    page_size: int = 16
    """Tokens per KV page."""
    num_pages: int = 1024
    """KV pages of an instance, all ranks together; num_pages x page_size tokens fit, less a page of each rank."""
    kv_dtype: Literal["auto", "float8_e4m3fn"] = "auto"
    """Type of the KV cache. `auto`: `model.dtype`. `float8_e4m3fn`: half of bfloat16's bytes, on the device, in the
    pool and on the way; what attention reads is rounded, so a policy of other, less exact logits is sampled."""
    kernels: Literal["auto", "xla", "pallas_tpu", "pallas_gpu", "reference"] = "auto"
    """What computes attention, experts and draws. `auto`: the best that is known of the platform (`seer-jax doctor`).
    One that is named serves or is refused; `reference` is for comparison, slow. Cache writes, draws with top-k or top-p
    and those of the deterministic mode are plain XLA whatever stands here."""
    max_prefill_tokens: int = 256
    """Prompt tokens computed per step at most, beside the decoding rows, on all ranks."""
    prefill_tile: int = 16
    """Query tokens of one request that attend together during prefill."""
    max_steps_per_dispatch: int = 32
    """Decode steps run on device before the host looks again, while no request needs it."""
    deterministic: bool = False
    """One step shape instead of buckets: the same bits whatever the batch, chunking or placement. Slower."""
    expert_ids: bool = False
    """Return with every response token which experts computed its distribution, for `train.replay_routing`."""
    compilation_cache_dir: str | None = "~/.cache/seer_jax/xla"
    """Compiled programs are kept here between runs; null = nowhere."""


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """Speculative decoding; changes no token, up to rounding (`engine.deterministic`: lines not a bit)."""

    mode: Literal["off", "suffix", "grouped", "grouped_tree"] = "off"
    """`off` (in quotes in YAML). `suffix`: a request drafts from itself. `grouped`: from all that its group has said.
    `grouped_tree`: the same, and drafts may branch."""
    max_draft_tokens: int = 8
    """Draft tokens of a request in one step at most, 32 at most."""
    min_probability: float = 0.1
    """A draft ends before it gets less likely than this."""
    budget: Literal["expected_gain", "mba", "mba_paper", "fixed"] = "expected_gain"
    """How many draft tokens a step verifies. `expected_gain`: those, of all requests, that give the most tokens per
    second. `mba`: one length for probes and one for all others, by expected gain; `mba_paper`: by the formula of
    Seer's Algorithm 1. `fixed`: all that were drafted."""
    priority_factor: float = 2.0
    """Seer's lambda, at least 1: what probes weigh against the others."""
    max_verify_tokens: int | None = None
    """Tokens that a step verifies at most, the newest one of each request included; null = 4 x engine.max_num_seqs."""
    verify_tile: int | None = None
    """Tokens of one request that attend together in verification; null = 1 on a CPU, 4 elsewhere."""
    profile: str | None = None
    """File with the step times that budgets are weighed with (`seer-jax profile`); null = measured at start."""
    group_ttl_s: float = 120.0
    """What an instance knows of a group is forgotten when it has not run there for so long."""
    sync_interval_s: float = 0.1
    """How often instances tell the draft server what their requests said, and ask what others did."""
    draft_servers: int = 1
    """Draft servers that share the groups; 0 = instances draft from what they ran themselves. `--runtime local` has one
    at most."""
    memory_tokens: int = 0
    """Tokens of earlier iterations' responses that are kept to draft from when their prompt comes again; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Mesh of one instance; the product of the axes is its number of devices."""

    data: int = 1
    """Ranks of data-parallel attention: each has requests and a KV cache of its own, a `data`-th of `engine.num_pages`,
    `max_num_seqs` and `max_prefill_tokens`. Experts are spread over all devices of the mesh."""
    expert: int = 1
    """Devices of a rank that experts are spread over; each holds all of the rank's cache and computes all of its
    attention, so `data` is better wherever there are enough requests."""
    tensor: int = 1
    """Devices of a rank that heads and hidden widths are spread over, and experts too."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """GRPO."""

    iterations: int = 12
    """RL iterations: rollout, reward, update, weights to the instances."""
    loss: Literal["grpo", "dr_grpo", "k15"] = "grpo"
    """`grpo`: group-normalised advantages, token-level clipping. `dr_grpo`: without length and std bias. `k15`: Kimi
    K1.5's squared objective."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup_updates: int = 2
    """Updates of linear warm-up."""
    adam_eps: float = 1e-8
    """Epsilon of Adam; above the size of single gradients it keeps noise from being blown up to full steps."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this."""
    clip_low: float = 0.2
    """Ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the initial weights (k3 estimator); 0 keeps no reference model."""
    k15_tau: float = 1.0
    """Temperature tau of the `k15` objective."""
    num_minibatches: int = 1
    """Optimizer updates per iteration; 1 is strictly on-policy."""
    tokens_per_microbatch: int = 8192
    """Padded tokens per gradient-accumulation step; bounds the learner's memory."""
    replay_routing: bool = False
    """Send the learner's tokens to the experts that the rollout chose; needs `engine.expert_ids`."""
    remat: bool = False
    """Recompute layers in the backward pass: a third more time, far less memory. For long sequences."""
    eval_samples: int = 1
    """Responses per held-out prompt when the reward is measured."""
    reward_timeout_s: float = 60.0
    """Longest that the reward function may take for a response; then it gets no reward, as after a crash."""
    checkpoint_every: int = 4
    """Iterations between checkpoints; the last iteration always writes one."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class KVPoolConfig:
    """Where the KV of paused requests goes."""

    backend: Literal["embedded", "ray", "mooncake"] = "embedded"
    """`embedded`: each instance has its own pool, used when others need the pages; it dies with the instance. `ray`: an
    owner per node, which all share; KV goes there at the end of every chunk and outlives its instance. `mooncake`: the
    same in a Mooncake store that runs already."""
    dram_mib: int = 4096
    """Host memory of each embedded pool or owner, in MiB."""
    disk_mib: int = 0
    """Disk space of each beyond that, in MiB; 0 = none."""
    directory: str | None = None
    """Where its files go, best on a local SSD; an earlier run's are deleted."""
    move: Literal["cheaper", "always"] = "cheaper"
    """`cheaper`: KV in the pool is computed again instead where that is measured to be faster. `always`: never."""
    mooncake_master: str = "127.0.0.1:50051"
    """`host:port` of `mooncake_master` (`scripts/start_mooncake.py`)."""
    mooncake_segment_mib: int = 0
    """Memory that each instance lends to Mooncake, in MiB, at least 16; it goes with the instance. 0 = none."""
    mooncake_buffer_mib: int = 64
    """Size of the two buffers between each instance and Mooncake, in MiB; a block must fit into one."""
    mooncake_timeout_s: float = 2.0
    """Longest wait for Mooncake; then its KV is computed again, and it is left alone until it answers."""


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    """Faults on purpose, to see that a rollout survives them with the same tokens."""

    kill_instance: int = 0
    """Instances killed at random moments of a rollout."""
    drop_message: float = 0.0
    """Share of the messages between controller and instances that get lost, with `runtime: ray`."""
    kill_pool_owner: int = 0
    """Owners of the KV pool killed at random moments of a rollout, with `kvpool.backend: ray`."""
    corrupt_block: int = 0
    """KV blocks that are damaged in the pool of each instance, the first ones put there in an iteration."""
    fill_disk: bool = False
    """Let the KV pools find their disk full."""
    slow_instance: float = 1.0
    """How many times as long the first instance takes for its steps."""
    seed: int = 0
    """Root of the randomness of faults."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run; what `--config` names and the command line overrides."""

    seed: int = 0
    """Root of all randomness: prompts, sampling, shuffling."""
    model: ModelSource = field(default_factory=ModelSource)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kvpool: KVPoolConfig = field(default_factory=KVPoolConfig)
    chaos: ChaosConfig = field(default_factory=ChaosConfig)
    run_dir: str = "runs/{name}-{time}"
    """Where metrics, configuration and checkpoints go; `{name}` is the preset, `{time}` the start."""


def num_mesh_devices(sharding: ShardingConfig) -> int:
    """Devices of one instance."""
    return sharding.data * sharding.expert * sharding.tensor
