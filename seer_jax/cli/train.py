"""`seer-jax train`: GRPO from a preset to a trained checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from seer_jax.cli.arguments import Settings, Switch, parse_job
from seer_jax.cli.dry_run import print_dry_run
from seer_jax.cli.options import TrainOptions
from seer_jax.config.schema import RunConfig
from seer_jax.config.validate import validate
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.run_dir import fill_run_dir
from seer_jax.obs.tables import print_summary


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Improve a model by GRPO. Every setting of the configuration is an option below.

    Short forms: --policy, --instances, --runtime for --rollout.policy, --rollout.instances, --rollout.runtime.
    """

    config: str = "tiny_math"
    """A preset (`seer-jax config list`) or the path of a YAML file; options override it."""
    resume: str | None = None
    """Go on from the last checkpoint in this run directory, with the configuration saved there; inside the next
    iteration's rollout if that was interrupted."""
    json: Switch = False
    """The last line of stdout is one JSON object; nothing else for humans is written there."""
    dry_run: Switch = False
    """Check everything, print the configuration and what would run, and stop."""
    run: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Train.

    Args:
        argv: Arguments after `train`.

    Returns:
        Exit code.

    Raises:
        SeerError: Bad input, or a run that failed.
    """
    arguments = parse_job(TrainArguments, argv, prog="seer-jax train")
    validate(arguments.run, training=True)
    if arguments.dry_run:
        print_dry_run(arguments.run, json=arguments.json)
        return 0
    resume = arguments.resume is not None
    run_dir = arguments.resume or fill_run_dir(arguments.run.run_dir, arguments.config, datetime.now())
    options = TrainOptions(run_dir=Path(run_dir).expanduser(), resume=resume, json=arguments.json)

    from seer_jax.cli import jobs

    try:
        result = jobs.train(arguments.run, options)
    except KeyboardInterrupt:
        if not options.run_dir.exists():
            raise
        print(f"\nseer-jax: interrupted; go on with: seer-jax train --resume {options.run_dir}", file=sys.stderr)
        return 130
    if arguments.json:
        print(to_json_line(result))
    else:
        print_summary(result)
    return 0
