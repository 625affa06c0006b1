"""Start Mooncake for the KV pool on loopback: a master, and a process that lends memory and outlives the instances.

    eval "$(python scripts/start_mooncake.py --env)"        # install what is missing, tell the loader where it is
    python scripts/start_mooncake.py --store-mib 1024       # until interrupted

Python's package comes from PyPI. System libraries that are missing are downloaded with apt-get and unpacked into a
directory, without root; nothing of the system is changed.
"""

import argparse
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PACKAGE = "mooncake-transfer-engine-non-cuda>=0.3.13"
LIBRARIES = {
    "libnuma.so.1": "libnuma1",
    "libnl-3.so.200": "libnl-3-200",
    "libnl-route-3.so.200": "libnl-route-3-200",
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
}
"""Shared objects that Mooncake needs, and Debian's packages of them."""


def main() -> None:
    """Install, then print the environment or run until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", action="store_true", help="install, print shell commands for the environment, end")
    parser.add_argument("--port", type=int, default=50051, help="of the master")
    parser.add_argument("--metrics-port", type=int, default=9003, help="of the master's page of figures")
    parser.add_argument("--store-mib", type=int, default=1024, help="memory to lend; 0 = a master only")
    parser.add_argument("--store-port", type=int, default=50052, help="of the process that lends it")
    parser.add_argument(
        "--libraries",
        type=Path,
        default=Path.home() / ".cache" / "seer_jax" / "mooncake",
        help="where system libraries that are missing go",
    )
    args = parser.parse_args()
    folders = install(args.libraries)
    path = ":".join([*map(str, folders), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    if args.env:
        print(f"export LD_LIBRARY_PATH='{path}'" if path else ":")
        return
    run(args, os.environ | {"LD_LIBRARY_PATH": path})


def install(libraries: Path) -> list[Path]:
    """Get what is missing; returns the folders that the loader has to know."""
    if importlib.util.find_spec("mooncake") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", PACKAGE], check=True, stdout=sys.stderr)
        importlib.invalidate_caches()
    found = {path.name for path in libraries.rglob("*.so.*")}
    missing = [package for name, package in LIBRARIES.items() if name not in found and not is_loadable(name)]
    if missing:
        libraries.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *missing], cwd=libraries, check=True, stdout=sys.stderr)
        for archive in libraries.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, libraries], check=True, stdout=sys.stderr)
            archive.unlink()
    return sorted({path.parent for path in libraries.rglob("*.so.*") if path.name in LIBRARIES})


def is_loadable(name: str) -> bool:
    """Whether the loader finds a shared object and all that it needs."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def run(args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Start the processes; when one ends, or at an interrupt, end them all."""
    package = Path(importlib.util.find_spec("mooncake").origin).parent
    loopback = "127.0.0.1"
    master = [package / "mooncake_master", f"--rpc_address={loopback}", f"--rpc_port={args.port}"]
    master += [f"--metrics_host={loopback}", f"--metrics_port={args.metrics_port}"]
    store = [package / "mooncake_client", f"--host={loopback}", f"--port={args.store_port}", "--protocol=tcp"]
    store += [f"--master_server_address={loopback}:{args.port}", "--metadata_server=P2PHANDSHAKE"]
    store += [f"--global_segment_size={args.store_mib}MB"]
    processes: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for command in [master, store] if args.store_mib else [master]:
            processes.append(subprocess.Popen(command, env=environment))
            time.sleep(1.0)  # The store's process gives up if the master is not there.
        print(f"mooncake_master at {loopback}:{args.port}, {args.store_mib} MiB lent", flush=True)
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
        sys.exit("a process of Mooncake ended")
    except KeyboardInterrupt:
        print("ending", file=sys.stderr)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    main()
