"""What a verb tells its job beside the configuration."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `jobs.train`.

    Attributes:
        run_dir: Where the run writes; not yet created unless `resume`.
        resume: Whether to go on from the last checkpoint in `run_dir`.
        json: Whether stdout belongs to machines: no display, no tables.
    """

    run_dir: Path
    resume: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Options of `jobs.rollout`.

    Attributes:
        run_dir: Where the run writes; not yet created unless `resume`.
        variants: What to run one after the other on the same prompts: values of `rollout.policy` and of
            `speculation.mode`.
        trace: File for the Perfetto trace of all variants; None writes none.
        resume: Whether to go on with the one rollout in `run_dir`, whose process died.
        json: Whether stdout belongs to machines: no display, no tables.
    """

    run_dir: Path
    variants: tuple[tuple[str, str], ...]
    trace: Path | None = None
    resume: bool = False
    json: bool = False
