"""`seer-jax profile`: how long the steps of a configuration take on this machine, for draft budgets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from seer_jax.cli.arguments import Settings, Switch, parse_job
from seer_jax.config.schema import RunConfig
from seer_jax.config.validate import validate
from seer_jax.core.errors import ConfigError
from seer_jax.core.latency import MeasuredStepTimes
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.tables import print_columns

DRAFT_LENGTHS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class ProfileArguments:
    """Time the decode and verification steps of one instance, and write them down for --speculation.profile.

    The table shows, by requests in a step, milliseconds of a plain step and of steps that verify drafts, and the tokens
    that a request must get out of such a step on average for it to be worth its time.
    """

    config: str = "tiny_math"
    """A preset (`seer-jax config list`) or the path of a YAML file; options override it."""
    out: str = "profile.json"
    """File to write."""
    json: Switch = False
    """The last line of stdout is one JSON object; nothing else for humans is written there."""
    run: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Measure, write, print.

    Args:
        argv: Arguments after `profile`.

    Returns:
        0.

    Raises:
        SeerError: Bad input, or an engine that cannot be built.
    """
    arguments = parse_job(ProfileArguments, argv, prog="seer-jax profile")
    config = arguments.run
    if config.speculation.mode == "off":
        config = replace(config, speculation=replace(config.speculation, mode="grouped"))
    validate(config, training=False)
    out = Path(arguments.out).expanduser()
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError("out", f"{arguments.out!r} cannot be written", "a file in a directory that exists")

    from seer_jax.cli import jobs

    times = jobs.profile(config)
    out.write_text(times.to_json(), encoding="utf-8")
    rows = break_even(times)
    if arguments.json:
        print(to_json_line({"out": str(out), "device": times.device, "rows": rows}))
    else:
        print_columns(rows)
        print(f"written to {out}; use it with --speculation.profile {out}")
    return 0


def break_even(times: MeasuredStepTimes) -> list[dict[str, float | int]]:
    """By requests in a step: its time, that of verifying drafts of each length, and what these must yield, at the
    shorter of the two contexts."""
    context, rows = float(times.contexts[0]), []
    for size in times.plain_sizes:
        plain = times.plain_step_s(size, context)
        row: dict[str, float | int] = {"requests": size, "plain_ms": plain * 1e3}
        for length in DRAFT_LENGTHS:
            if size * (1 + length) <= times.verify_sizes[-1]:
                verify = float(times.verify_step_s(size, size * (1 + length), context))
                row |= {f"drafts_of_{length}_ms": verify * 1e3, f"drafts_of_{length}_must_yield": verify / plain}
        rows.append(row)
    return rows
