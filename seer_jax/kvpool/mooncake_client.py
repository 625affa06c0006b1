"""Mooncake's own client: how it is found and started, and what its codes mean."""

import importlib
import re
import socket
from typing import Any

from seer_jax.core.errors import ConfigError
from seer_jax.kvpool.blocks import HEADER_BYTES

MIN_SEGMENT_BYTES = 16 << 20
"""Mooncake refuses to mount less."""
EPOCH_DIGITS = 20

# Codes of its calls, from mooncake-store/include/types.h.
NO_AVAILABLE_HANDLE = -200
INVALID_PARAMS = -600
RPC_FAIL = -900


def check_settings(namespace: str, segment_bytes: int, buffer_bytes: int, timeout_s: float) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: If a value makes no sense.
    """
    if not re.fullmatch("[A-Za-z0-9_-]+", namespace):
        raise ConfigError("MooncakeKVPool.namespace", f"is {namespace!r}", "letters, digits, _ and -")
    if segment_bytes and segment_bytes < MIN_SEGMENT_BYTES:
        raise ConfigError(
            "MooncakeKVPool.segment_bytes",
            f"is {segment_bytes}",
            f"0, or at least {MIN_SEGMENT_BYTES}, Mooncake's least",
        )
    if buffer_bytes <= HEADER_BYTES:
        raise ConfigError("MooncakeKVPool.buffer_bytes", f"is {buffer_bytes}", f"a header alone has {HEADER_BYTES}")
    if not timeout_s > 0:
        raise ConfigError("MooncakeKVPool.timeout_s", f"is {timeout_s}", "must be above 0")


def connect(master: str, *, segment_bytes: int, timeout_s: float) -> Any:
    """Start a client over TCP with peer-to-peer metadata, without a local buffer of its own.

    Other clients reach it by this machine's address towards the master.

    Args:
        master: `host:port` of `mooncake_master`.
        segment_bytes: Memory it lends to the store; 0 = none.
        timeout_s: Longest to wait for the master's port to open.

    Returns:
        A `MooncakeDistributedStore`.

    Raises:
        ConfigError: If the package or its libraries are missing, or there is no master.
    """
    store = load_store_class()()
    address = _reach(master, timeout_s)
    code = store.setup(address, "P2PHANDSHAKE", segment_bytes, 0, "tcp", "", master)
    if code:
        raise ConfigError("MooncakeKVPool.master", f"mooncake would not start with {master}, code {code}")
    return store


def load_store_class() -> Any:
    """Import Mooncake; returns its `MooncakeDistributedStore`.

    Raises:
        ConfigError: If the package or its libraries are missing.
    """
    try:
        return importlib.import_module("mooncake.store").MooncakeDistributedStore
    except ModuleNotFoundError as error:
        hint = "pip install 'seer_jax[mooncake]'; on a machine with CUDA mooncake-transfer-engine instead"
        raise ConfigError("MooncakeKVPool", "Mooncake is not installed", hint) from error
    except ImportError as error:
        hint = "scripts/start_mooncake.py --env gets Debian's and prints the LD_LIBRARY_PATH for them"
        raise ConfigError("MooncakeKVPool", f"a system library of Mooncake is missing: {error}", hint) from error


def _reach(master: str, timeout_s: float) -> str:
    """Look whether somebody listens: Mooncake's setup would try for 90 s, all the time holding Python's lock.

    Returns:
        This machine's address towards the master.
    """
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError("MooncakeKVPool.master", f"is {master!r}", "give host:port")
    try:
        with socket.create_connection((host, int(port)), timeout_s) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        hint = "start one with scripts/start_mooncake.py"
        raise ConfigError("MooncakeKVPool.master", f"no mooncake_master at {master}: {error}", hint) from error


def epoch_name(epoch: int) -> str:
    """An epoch as it stands in names, of fixed width, so that `less_than` can tell them apart by pattern."""
    return f"{epoch:0{EPOCH_DIGITS}d}"


def less_than(epoch: int) -> str:
    """Regular expression of the names of all epochs below a positive one."""
    digits = epoch_name(epoch)
    smaller = [
        f"{digits[:index]}[0-{int(digit) - 1}][0-9]{{{EPOCH_DIGITS - 1 - index}}}"
        for index, digit in enumerate(digits)
        if digit != "0"
    ]
    return "|".join(smaller)
