"""Pools from a configuration."""

from pathlib import Path

from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError, ProtocolError
from seer_jax.kvpool.embedded import EmbeddedKVPool
from seer_jax.kvpool.pool import KVPool


def open_pool(config: RunConfig, name: str) -> KVPool:
    """Open an instance's pool, by the name of the backend.

    `ray` is not opened here: an instance's actor brings it, since only `distributed` knows Ray.

    Args:
        config: The run.
        name: Of its directory in `kvpool.directory`, if it has one.

    Raises:
        ConfigError: If its settings cannot be used.
        ProtocolError: For a backend that is not opened here.
    """
    match config.kvpool.backend:
        case "embedded":
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
