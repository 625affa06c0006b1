"""`seer-jax rollout`: one iteration's responses, and how fast the scheduling got them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import get_args, get_type_hints

from seer_jax.cli.arguments import Settings, Switch, parse_job
from seer_jax.cli.dry_run import print_dry_run
from seer_jax.cli.options import RolloutOptions
from seer_jax.config.schema import RolloutConfig, RunConfig
from seer_jax.config.suggest import did_you_mean
from seer_jax.config.validate import validate
from seer_jax.core.errors import ConfigError
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.run_dir import fill_run_dir
from seer_jax.obs.tables import print_rollouts


@dataclass(frozen=True, kw_only=True)
class RolloutArguments:
    """Sample responses once and measure the scheduling. Every setting of the configuration is an option below.

    Short forms: --policy, --instances, --runtime for --rollout.policy, --rollout.instances, --rollout.runtime.
    """

    config: str = "tiny_math"
    """A preset (`seer-jax config list`) or the path of a YAML file; options override it."""
    compare: str | None = None
    """Policies to run one after the other on the same prompts, such as `seer,group_round_robin`."""
    json: Switch = False
    """The last line of stdout is one JSON object; nothing else for humans is written there."""
    dry_run: Switch = False
    """Check everything, print the configuration and what would run, and stop."""
    run: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Roll out.

    Args:
        argv: Arguments after `rollout`.

    Returns:
        Exit code.

    Raises:
        SeerError: Bad input, or a run that failed.
    """
    arguments = parse_job(RolloutArguments, argv, prog="seer-jax rollout")
    policies = _list_policies(arguments)
    validate(arguments.run, training=False)
    if arguments.dry_run:
        print_dry_run(arguments.run, json=arguments.json)
        return 0
    run_dir = fill_run_dir(arguments.run.run_dir, arguments.config, datetime.now())

    from seer_jax.cli import jobs

    runs = jobs.rollout(arguments.run, RolloutOptions(run_dir=run_dir, policies=policies, json=arguments.json))
    if arguments.json:
        print(to_json_line({"runs": runs} if arguments.compare is not None else runs[0]))
    else:
        print_rollouts(runs)
    return 0


def _list_policies(arguments: RolloutArguments) -> tuple[str, ...]:
    if arguments.compare is None:
        return (arguments.run.rollout.policy,)
    known = get_args(get_type_hints(RolloutConfig)["policy"])
    policies = tuple(part.strip() for part in arguments.compare.split(","))
    for policy in policies:
        if policy not in known:
            raise ConfigError("compare", f"no policy {policy!r}", did_you_mean(policy, known))
    return policies
