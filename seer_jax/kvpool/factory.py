"""Pools from a configuration."""

import logging
import math
import secrets
from pathlib import Path

from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError, ProtocolError
from seer_jax.kvpool.blocks import HEADER_BYTES
from seer_jax.kvpool.embedded import EmbeddedKVPool
from seer_jax.kvpool.mooncake import MooncakeKVPool
from seer_jax.kvpool.pool import KVPool


def new_run_name() -> str:
    """Name what the instances of one run share, and no other run, not even the one that it resumes.

    Keys tell the epochs of one run's weights apart, not two runs' weights.
    """
    return f"seer-{secrets.token_hex(8)}"


def open_pool(config: RunConfig, name: str, run_name: str, *, block_bytes: int, is_replacement: bool) -> KVPool:
    """Open an instance's pool, by the name of the backend.

    `ray` is not opened here: an instance's actor brings it, since only `distributed` knows Ray.

    Args:
        config: The run.
        name: Of its directory in `kvpool.directory`, if it has one.
        run_name: Of `new_run_name`, the same for all instances of the run.
        block_bytes: Size of the largest block that will be put there.
        is_replacement: Whether the run is under way: then an instance that finds no Mooncake has an embedded pool.

    Raises:
        ConfigError: If its settings cannot be used, or there is no Mooncake when the run starts.
        ProtocolError: For a backend that is not opened here.
    """
    match config.kvpool.backend:
        case "embedded":
            return open_embedded_pool(config, name)
        case "mooncake":
            try:
                return open_mooncake_pool(config, run_name, block_bytes)
            except ConfigError as error:
                if not is_replacement:
                    raise
                logging.warning("A new instance keeps its KV itself: %s", error)
                return open_embedded_pool(config, name)
        case backend:
            raise ProtocolError(f"a KV pool of backend {backend!r} is not opened by the instance itself")


def open_embedded_pool(config: RunConfig, name: str) -> EmbeddedKVPool:
    """Open a pool of this process.

    Args:
        config: The run.
        name: Of its directory in `kvpool.directory`.

    Raises:
        ConfigError: If that cannot be used.
    """
    settings = config.kvpool
    if not settings.disk_mib:
        return EmbeddedKVPool(settings.dram_mib << 20)
    directory = Path(settings.directory).expanduser() / name
    try:
        # What another run left there is of other weights, whatever it says of its epoch.
        pool = EmbeddedKVPool(
            settings.dram_mib << 20, directory=directory, max_disk_bytes=settings.disk_mib << 20, keeps_files=False
        )
    except OSError as error:
        raise ConfigError("kvpool.directory", f"cannot use {str(directory)!r}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"kvpool.{error.path}", error.message, error.hint) from error
    if config.chaos.fill_disk:
        pool.fill_disk()
    return pool


def open_mooncake_pool(config: RunConfig, run_name: str, block_bytes: int) -> MooncakeKVPool:
    """Become a client of the Mooncake store that `kvpool.mooncake_master` leads.

    Args:
        config: The run.
        run_name: Of `new_run_name`.
        block_bytes: Size of the largest block that will be put there; it must fit in `kvpool.mooncake_buffer_mib`.

    Raises:
        ConfigError: If it is not installed, its master does not answer, or the settings cannot be used.
    """
    settings = config.kvpool
    least_mib = math.ceil((HEADER_BYTES + block_bytes) / (1 << 20))
    if settings.mooncake_buffer_mib < least_mib:
        problem = f"is {settings.mooncake_buffer_mib}, but a KV block of this model has {block_bytes} bytes"
        raise ConfigError("kvpool.mooncake_buffer_mib", problem, f"give at least {least_mib}")
    try:
        return MooncakeKVPool(
            settings.mooncake_master,
            namespace=run_name,
            segment_bytes=settings.mooncake_segment_mib << 20,
            buffer_bytes=settings.mooncake_buffer_mib << 20,
            timeout_s=settings.mooncake_timeout_s,
        )
    except ConfigError as error:
        argument = error.path.partition(".")[2].replace("_bytes", "_mib")
        path = f"kvpool.mooncake_{argument}" if argument else "kvpool.backend"
        raise ConfigError(path, error.message, error.hint) from error
