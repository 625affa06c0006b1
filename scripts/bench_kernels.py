"""Time of every kernel implementation as a fraction of what the device could do at best.

    python scripts/bench_kernels.py --json

The bound of a call is the longer of bytes / bandwidth and operations / rate; `kernel_cases.py` counts both. Bandwidth
is that of a copy, measured in the same run; the rate is the data sheet's, or, of a device that is not in
`seer_jax.sim.hardware`, that of a large product measured here. What fits in a CPU's caches may beat the bound. On a CPU
`xla` is compared with `reference`, on a GPU or TPU the platform's kernel with `xla`. Needs jax, jaxtyping and numpy;
where seer_jax is not installed, run it with PYTHONPATH=. from the repository.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from kernel_cases import Case, list_cases

from seer_jax.sim.hardware import CHIPS

CHIP_OF_KIND = {"H200": "h200", "H100": "h100", "H800": "h800"} | {
    "v5 lite": "tpu_v5e", "v5e": "tpu_v5e", "v5p": "tpu_v5p", "v5": "tpu_v5p", "v6": "tpu_v6e"
}  # fmt: skip
"""Part of jax's `device_kind`, the first that fits -> chip."""
COPY_BYTES = {"cpu": 1 << 29}
"""What is copied: more than caches hold. 2 GiB on accelerators."""
MATMUL_SIZE = {"cpu": 1024}
"""8192 on accelerators."""
MIN_SECONDS = 0.02
"""Length of a timed loop."""
LOOPS = 7
"""Of which the fastest counts."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device can do.

    Attributes:
        bytes_per_s: Read and written by a copy, measured.
        flops_per_s: Of products in the type of the cases.
        flops_source: "data sheet of CHIP" or "measured".
    """

    bytes_per_s: float
    flops_per_s: float
    flops_source: str


def main() -> int:
    """Measure and print; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operation", default="", help="only operations with this in their name")
    parser.add_argument("--smallest", action="store_true", help="only the smallest case of each operation")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    args = parser.parse_args()
    cases = [case for case in list_cases(jax.default_backend()) if args.operation in case.operation]
    if args.smallest:
        cases = list({case.operation: case for case in reversed(cases)}.values())[::-1]
    limits = measure_limits()
    print(f"{jax.devices()[0].device_kind}: {asdict(limits)}", flush=True)
    rows = []
    for case in cases:
        for row in measure_case(case, limits):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    if args.json:
        print(json.dumps(describe() | {"limits": asdict(limits), "rows": rows}))
    return int(any("error" in row for row in rows))


def describe() -> dict[str, Any]:
    """Device, versions and commit; the commit is None where there is no repository, and ends in + with changes."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    commit = git(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"])
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
    }


def measure_limits() -> Limits:
    """Copy for the bandwidth; look the rate up, or multiply for it."""
    on, kind = jax.default_backend(), jax.devices()[0].device_kind
    size = COPY_BYTES.get(on, 1 << 31)
    copy_s = measure(lambda x: x + 1, (jnp.zeros(size // 4, jnp.float32),))
    chip = next((CHIPS[chip] for part, chip in CHIP_OF_KIND.items() if part in kind), None)
    if chip is not None:
        return Limits(
            bytes_per_s=2 * size / copy_s, flops_per_s=chip.flops_per_s, flops_source=f"data sheet of {chip.name}"
        )
    n, dtype = MATMUL_SIZE.get(on, 8192), "float32" if on == "cpu" else "bfloat16"
    matrix = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product_s = measure(lambda x, y: (x @ y) * jnp.asarray(n**-0.5, dtype), (matrix, matrix))
    return Limits(bytes_per_s=2 * size / copy_s, flops_per_s=2 * n**3 / product_s, flops_source="measured")


def measure_case(case: Case, limits: Limits) -> list[dict[str, Any]]:
    """Time every implementation; one that fails has an `error` in place of figures."""
    memory_s, compute_s = case.num_bytes / limits.bytes_per_s, case.flops / limits.flops_per_s
    arrays, times, results = case.make_arrays(), {}, {}
    rows: dict[str, dict[str, Any]] = {}
    for name, function in reversed(case.implementations.items()):
        row = rows[name] = {
            "operation": case.operation,
            "shape": case.shape,
            "implementation": name,
            "num_bytes": case.num_bytes,
            "flops": case.flops,
        }
        call = functools.partial(case.call, function)
        try:
            results[name] = np.asarray(jax.jit(call)(*arrays), np.float32)
            times[name] = measure(lambda *a, call=call: case.feed(a[0], call(*a)), arrays)
        except Exception as error:  # A compiler's, a kernel's: whatever it is, a run on a lent device says all it can.
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        row |= {
            "us": float(f"{times[name] * 1e6:.4g}"),
            "gb_per_s": round(case.num_bytes / times[name] / 1e9, 2),
            "tflop_per_s": round(case.flops / times[name] / 1e12, 4),
            "bound": "memory" if memory_s >= compute_s else "compute",
            "bound_us": float(f"{max(memory_s, compute_s) * 1e6:.4g}"),
            "fraction_of_bound": float(f"{max(memory_s, compute_s) / times[name]:.4g}"),
        }
        other = list(case.implementations)[-1]
        if name != other and other in times:
            row[f"times_as_fast_as_{other}"] = round(times[other] / times[name], 3)
            scale = np.abs(results[other]).max()
            row["difference"] = float(f"{np.abs(results[name] - results[other]).max() / scale:.2e}")
    return [rows[name] for name in case.implementations]


def make_loop(advance: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Make `(repeats, first, *rest) -> first` of `advance(first, *rest) -> first`; it takes `first`'s memory.

    On accelerators `repeats` is static, since a GPU asks the host after every turn of a loop of unknown length whether
    it goes on. On a CPU it is not, or XLA would unroll a few turns and compute several in one pass over memory.
    """

    def run(repeats: int | jax.Array, first: jax.Array, *rest: jax.Array) -> jax.Array:
        # The barrier keeps work on arrays that no call changes (a gather of the cache) inside the loop.
        def body(_: jax.Array, first: jax.Array) -> jax.Array:
            return advance(*jax.lax.optimization_barrier((first, *rest)))

        return jax.lax.fori_loop(0, repeats, body, first)

    return jax.jit(run, static_argnums=() if jax.default_backend() == "cpu" else 0, donate_argnums=1)


def measure(advance: Callable[..., jax.Array], arrays: tuple[jax.Array | None, ...]) -> float:
    """Seconds of one call: the best of several loops on the device."""
    run, first = make_loop(advance), jnp.copy(arrays[0])

    def seconds(repeats: int) -> float:
        nonlocal first
        started = time.perf_counter()
        first = jax.block_until_ready(run(repeats, first, *arrays[1:]))
        return time.perf_counter() - started

    seconds(1)  # Compiles, as the next but one does.
    repeats = max(1, round(MIN_SECONDS / seconds(1)))
    seconds(repeats)
    return min(seconds(repeats) for _ in range(LOOPS)) / repeats


if __name__ == "__main__":
    sys.exit(main())
