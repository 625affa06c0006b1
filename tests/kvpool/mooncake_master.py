"""A real `mooncake_master` on loopback for the tests, or the reason why there is none."""

import atexit
import functools
import importlib
import importlib.util
import socket
import subprocess
import time
from pathlib import Path

import pytest


def reason_for_skipping() -> str:
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:  # The package, or a library that it needs.
        return f"no Mooncake ({error}): see scripts/start_mooncake.py --env"
    return ""


REASON = reason_for_skipping()
NEEDED = (pytest.mark.mooncake, pytest.mark.skipif(bool(REASON), reason=REASON))
"""Marks of a test that needs Mooncake."""


def needs_mooncake(test):
    for mark in NEEDED:
        test = mark(test)
    return test


class Master:
    """A master at a port of its own, which can be killed and started again."""

    def __init__(self, *flags: str):
        self.ports = free_ports(2)
        self.address = f"127.0.0.1:{self.ports[0]}"
        self._flags = flags
        self.start()

    def start(self):
        program = Path(importlib.util.find_spec("mooncake").origin).with_name("mooncake_master")
        flags = [f"--rpc_port={self.ports[0]}", f"--metrics_port={self.ports[1]}", *self._flags]
        flags += ["--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1"]
        self.process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(self.process.kill)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"mooncake_master ended with {self.process.returncode}"
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self.ports[0])) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("mooncake_master does not listen")

    def kill(self):
        self.process.kill()
        self.process.wait()


@functools.cache
def shared_master() -> Master:
    """For all tests that leave their master alive."""
    return Master()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
