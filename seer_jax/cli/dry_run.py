"""`--dry-run`: everything that can be checked and said without a device."""

import math
from dataclasses import asdict
from typing import Any

from seer_jax.config.dump import to_yaml
from seer_jax.config.presets import resolve_preset_path
from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.tables import print_summary

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


def print_dry_run(config: RunConfig, *, json: bool) -> None:
    """Print the resolved configuration and what would run.

    Args:
        config: A validated configuration.
        json: Whether to print one JSON object instead.

    Raises:
        ConfigError: If the task, its data or the model's `config.json` is unusable, or they do not fit together.
    """
    plan = make_plan(config)
    if json:
        print(to_json_line({"dry_run": True, "plan": plan, "config": asdict(config)}))
    else:
        print(to_yaml(config))
        print_summary(plan, title="would run")


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Work out the size of a run from the configuration and the model's `config.json`.

    Args:
        config: A validated configuration.

    Returns:
        Instances, requests, pages and bytes, ready to print.

    Raises:
        ConfigError: If the task, its data or the model's `config.json` is unusable, or they do not fit together.
    """
    # These import jax, which parsing and checking the arguments must not wait for.
    from seer_jax.models.specs import decoder_specs
    from seer_jax.sharding import check_divisible
    from seer_jax.train.checks import check_task, stop_token_ids
    from seer_jax.train.tasks import make_task
    from seer_jax.weights.checkpoint import load_config

    task = make_task(config.data)
    model = load_config(resolve_preset_path(config.model.path))
    check_task(task, config, model)
    check_divisible(config.sharding, decoder_specs(model, config.model.dtype))
    rollout, engine = config.rollout, config.engine
    kv_dtype = config.model.dtype if engine.kv_dtype == "auto" else engine.kv_dtype
    kv_bytes_per_token = model.num_hidden_layers * model.latent_width * BYTES_PER_VALUE[kv_dtype]
    return {
        "instances": rollout.instances,
        "devices_per_instance": num_mesh_devices(config.sharding),
        "runtime": rollout.runtime,
        "policy": rollout.policy,
        "requests_per_iteration": rollout.num_groups * rollout.group_size,
        "chunks_per_request_max": math.ceil(config.sampling.max_tokens / rollout.chunk_size),
        "prompt_tokens_max": task.max_prompt_tokens,
        "stop_token_ids": stop_token_ids(config, model),
        "kvpool_backend": config.kvpool.backend,
        **({"mooncake_master": config.kvpool.mooncake_master} if config.kvpool.backend == "mooncake" else {}),
        "pages_per_instance": engine.num_pages,
        "kv_tokens_per_instance": (engine.num_pages - config.sharding.data) * engine.page_size,
        "kv_dtype": kv_dtype,
        "kv_bytes_per_token": kv_bytes_per_token,
        "kv_bytes_per_instance": engine.num_pages * engine.page_size * kv_bytes_per_token,
    }
