"""Engines and in-process clusters from a configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from seer_jax.config.schema import RunConfig, num_mesh_devices
from seer_jax.engine.cluster import LocalCluster
from seer_jax.engine.engine import Engine
from seer_jax.engine.kv_blocks import BlockLayout
from seer_jax.kvpool import KVPool
from seer_jax.kvpool.factory import new_run_name, open_pool
from seer_jax.models.config import DecoderConfig
from seer_jax.sharding import make_mesh


def build_engine(
    config: RunConfig,
    model_config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    instance_id: int,
    place: int = 0,
    first_device: int = 0,
    kv_pool: KVPool | None = None,
    run_name: str | None = None,
    is_replacement: bool = False,
) -> Engine:
    """Build an engine on this process's devices and compile its programs.

    Args:
        config: The run.
        model_config: Shapes of the model.
        params: Weights, on host or device.
        instance_id: Name in events.
        place: Which of the run's instances it is, or replaces; names its directory in the KV pool's.
        first_device: Index of the mesh's first device in this process.
        kv_pool: Its view of a pool that instances share; None = what `kvpool.backend` names.
        run_name: See `open_pool`; None = nobody else's.
        is_replacement: See `open_pool`.

    Raises:
        ConfigError: If the mesh does not fit the devices or the model, or the KV pool cannot be opened.
    """
    enable_compilation_cache(config.engine.compilation_cache_dir)
    if kv_pool is None:
        kv_pool = open_pool(
            config,
            f"instance-{place}",
            run_name or new_run_name(),
            block_bytes=BlockLayout.of(model_config, config.engine, params).block_bytes,
            is_replacement=is_replacement,
        )
    engine = Engine(
        model_config,
        params,
        config.engine,
        speculation=config.speculation,
        instance_id=instance_id,
        mesh=make_mesh(config.sharding, jax.devices()[first_device:]),
        kv_pool=kv_pool,
        always_moves_kv=config.kvpool.move == "always",
        chaos=config.chaos,
    )
    engine.warmup(num_peers=config.rollout.instances, truncates=needs_truncation(config))
    return engine


def needs_truncation(config: RunConfig) -> bool:
    """Whether the run's requests use top-k or top-p."""
    return config.sampling.top_k > 0 or config.sampling.top_p < 1


def build_local_cluster(
    config: RunConfig, model_config: DecoderConfig, params: Mapping[str, Any], *, first_instance_id: int = 0
) -> LocalCluster:
    """Build all instances in this process; they share devices when there are not enough for all.

    See `RayCluster` for the arguments.
    """
    size, num_devices = num_mesh_devices(config.sharding), len(jax.devices())
    run_name, first_replacement = new_run_name(), first_instance_id + config.rollout.instances

    def build(place: int, instance_id: int, weights: Mapping[str, Any]) -> Engine:
        first = place * size if (place + 1) * size <= num_devices else 0
        return build_engine(
            config,
            model_config,
            weights,
            instance_id=instance_id,
            place=place,
            first_device=first,
            run_name=run_name,
            is_replacement=instance_id >= first_replacement,
        )

    engines = [build(place, first_instance_id + place, params) for place in range(config.rollout.instances)]
    return LocalCluster(
        engines,
        config.speculation,
        build=build,
        max_replacements=config.rollout.max_replacements,
        chaos=config.chaos,
    )


def enable_compilation_cache(directory: str | None) -> None:
    """Keep compiled programs in `directory` between processes; None keeps them in memory only."""
    if directory is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
