"""`seer-jax rollout`: one iteration's responses, and how fast the scheduling got them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import get_args, get_type_hints

from seer_jax.cli.arguments import Settings, Switch, parse_job
from seer_jax.cli.dry_run import print_dry_run
from seer_jax.cli.options import RolloutOptions
from seer_jax.config.schema import RolloutConfig, RunConfig, SpeculationConfig
from seer_jax.config.suggest import did_you_mean
from seer_jax.config.validate import validate
from seer_jax.core.errors import ConfigError
from seer_jax.obs.metrics import to_json_line
from seer_jax.obs.run_dir import fill_run_dir
from seer_jax.obs.tables import print_rollouts
from seer_jax.obs.trace import check_trace_path


@dataclass(frozen=True, kw_only=True)
class RolloutArguments:
    """Sample responses once and measure the scheduling. Every setting of the configuration is an option below.

    Short forms: --policy, --instances, --runtime for --rollout.policy, --rollout.instances, --rollout.runtime; and
    --chaos kill_instance=2,slow_instance=4x for --chaos.kill_instance 2 --chaos.slow_instance 4.
    """

    config: str = "tiny_math"
    """A preset (`seer-jax config list`) or the path of a YAML file; options override it."""
    compare: str | None = None
    """Policies to run one after the other on the same prompts, such as `seer,group_round_robin`; each may name its
    speculation, such as `seer:off,seer:grouped`."""
    trace: str | None = None
    """File (.json or .json.gz) for a trace of which instance ran what when, for https://ui.perfetto.dev."""
    resume: str | None = None
    """Directory of a rollout whose process died: go on with it, by its event log. Instead of --config and --compare."""
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
    variants = _list_variants(arguments)
    if len(variants) == 1:  # What its directory says it is.
        [(policy, mode)] = variants
        run = arguments.run
        run = replace(run, rollout=replace(run.rollout, policy=policy), speculation=replace(run.speculation, mode=mode))
        arguments = replace(arguments, run=run)
    validate(arguments.run, training=False)
    if arguments.run.speculation.memory_tokens:
        problem = f"is {arguments.run.speculation.memory_tokens}, but a rollout has no earlier iteration"
        raise ConfigError("speculation.memory_tokens", problem, "leave it 0 here; it is for training")
    trace = None if arguments.trace is None else Path(arguments.trace).expanduser()
    if trace is not None:
        check_trace_path(trace)
    if arguments.dry_run:
        print_dry_run(arguments.run, json=arguments.json)
        return 0
    if arguments.resume is None:
        run_dir = fill_run_dir(arguments.run.run_dir, arguments.config, datetime.now())
    else:
        run_dir = Path(arguments.resume).expanduser()

    from seer_jax.cli import jobs

    resume = arguments.resume is not None
    options = RolloutOptions(run_dir=run_dir, variants=variants, trace=trace, resume=resume, json=arguments.json)
    runs = jobs.rollout(arguments.run, options)
    if arguments.json:
        print(to_json_line({"runs": runs} if arguments.compare is not None else runs[0]))
    else:
        print_rollouts(runs)
    return 0


def _list_variants(arguments: RolloutArguments) -> tuple[tuple[str, str], ...]:
    """The policy and the speculation mode of every rollout."""
    run = arguments.run
    if arguments.resume is not None and arguments.compare is not None:
        raise ConfigError("compare", "several rollouts cannot be resumed", "start them anew, without --resume")
    if arguments.compare is None:
        return ((run.rollout.policy, run.speculation.mode),)
    policies, modes = (
        get_args(get_type_hints(RolloutConfig)["policy"]),
        get_args(get_type_hints(SpeculationConfig)["mode"]),
    )
    variants = []
    for part in arguments.compare.split(","):
        policy, colon, mode = (word.strip() for word in part.partition(":"))
        if policy not in policies:
            raise ConfigError("compare", f"no policy {policy!r}", did_you_mean(policy, policies))
        if colon and mode not in modes:
            raise ConfigError("compare", f"no speculation {mode!r}", did_you_mean(mode, modes))
        variants.append((policy, mode or run.speculation.mode))
    return tuple(variants)
