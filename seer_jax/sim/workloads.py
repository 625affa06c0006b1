"""The workloads of the paper: what is simulated, with the origin of every number.

A file `configs/sim/*.yaml` holds `chip`, `vanilla` (how the baseline drafts), perhaps `trace` (lengths to draw from),
the constants in sections, each `{value, kind, source}`, and below `paper` the paper's figures by experiment. Every
constant must be there, and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

from seer_jax.config.decode import read_number
from seer_jax.config.presets import find_preset, read_yaml
from seer_jax.config.suggest import did_you_mean
from seer_jax.core.errors import ConfigError
from seer_jax.sim.constants import CONSTANTS, Constant, check_keys, read_choice, read_constant, read_value
from seer_jax.sim.hardware import CHIPS
from seer_jax.sim.lengths import LengthSpec
from seer_jax.sim.roofline import RooflineStepTimes
from seer_jax.sim.speculation import SpeculationSpec, VanillaKind, VanillaSpec


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One column of the paper's evaluation.

    Attributes:
        name: Of its file.
        chip: Key of `CHIPS`.
        vanilla: How the baseline drafts.
        trace: File with lengths, see `LengthSpec`.
        constants: By `section.name`, all of `CONSTANTS`.
        paper: The paper's figures, by experiment and name.
    """

    name: str
    chip: str
    vanilla: VanillaKind
    trace: str | None
    constants: Mapping[str, Constant]
    paper: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        if self.group_size > self.num_requests:
            problem = f"is {self.group_size}, more than all {self.num_requests} requests"
            raise ConfigError("requests.group_size", problem, "smaller groups, or more requests")
        if self.chips_per_instance % self.ranks_per_instance:
            problem = f"is {self.ranks_per_instance}, there are {self.chips_per_instance} chips"
            raise ConfigError("cluster.ranks_per_instance", problem, "a divisor of the chips")
        if self.constants["model.experts_per_token"].value > self.constants["model.num_experts"].value:
            raise ConfigError("model.experts_per_token", "is above model.num_experts", "0 and 0 for a dense model")
        chips, seconds = self.exchange_s_per_layer
        if len(chips) != len(seconds):
            problem = f"has {len(chips)} values, exchange.seconds_per_layer has {len(seconds)}"
            raise ConfigError("exchange.chips", problem, "as many of both")
        if list(chips) != sorted(set(chips)):
            raise ConfigError("exchange.chips", f"is {list(chips)}", "ascending, none twice")
        _ = self.lengths, self.speculation  # They check themselves.

    @cached_property
    def num_instances(self) -> int:
        """Instances."""
        return self._int("cluster.num_instances")

    @cached_property
    def chips_per_instance(self) -> int:
        """Chips of an instance."""
        return self._int("cluster.chips_per_instance")

    @cached_property
    def ranks_per_instance(self) -> int:
        """Data-parallel ranks of an instance, each with its own KV cache; they step together."""
        return self._int("cluster.ranks_per_instance")

    @cached_property
    def kv_bytes_per_rank(self) -> float:
        """Memory for KV cache of a rank."""
        return self._float("cluster.kv_bytes_per_rank")

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """KV cache of a token."""
        return self._float("model.kv_bytes_per_token")

    @cached_property
    def kv_tokens_per_rank(self) -> int:
        """Tokens whose KV a rank holds, whole pages."""
        pages = int(self.kv_bytes_per_rank / self.kv_bytes_per_token) // self.page_size
        return pages * self.page_size

    @cached_property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._int("cluster.page_size")

    @cached_property
    def max_num_seqs(self) -> int:
        """Requests that an instance decodes at once, all its ranks together."""
        return self._int("cluster.max_num_seqs")

    @cached_property
    def chunk_size(self) -> int:
        """Tokens of a chunk of divided rollout."""
        return self._int("cluster.chunk_size")

    @cached_property
    def transfer_bytes_per_s(self) -> float:
        """To or from the KV pool, of an instance; a request of one rank gets `1 / ranks_per_instance` of it."""
        return self._float("cluster.transfer_bytes_per_s")

    @cached_property
    def transfer_latency_s(self) -> float:
        """Seconds before the first byte of a transfer."""
        return self._float("cluster.transfer_latency_s")

    @cached_property
    def num_requests(self) -> int:
        """Requests of an iteration."""
        return self._int("requests.num_requests")

    @cached_property
    def group_size(self) -> int:
        """Requests of a group."""
        return self._int("requests.group_size")

    @cached_property
    def num_groups(self) -> int:
        """Groups of an iteration."""
        return self.num_requests // self.group_size

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of every prompt."""
        return self._int("requests.prompt_tokens")

    @cached_property
    def lengths(self) -> LengthSpec:
        """Lengths of the responses."""
        return LengthSpec(
            mean=self._float("requests.mean_length"),
            limit=self._int("requests.limit"),
            sigma=self._float("requests.sigma"),
            correlation=self._float("requests.correlation"),
            trace=self.trace,
        )

    @cached_property
    def times(self) -> RooflineStepTimes:
        """Step times of an instance."""
        names = {name: f"{section}.{name}" for section in ("model", "times") for name in CONSTANTS[section]}
        return RooflineStepTimes(
            chip=CHIPS[self.chip],
            num_chips=self.chips_per_instance,
            num_ranks=self.ranks_per_instance,
            **{name: self.constants[key].value for name, key in names.items()},
        )

    @cached_property
    def exchange_layers(self) -> int:
        """Layers whose tokens travel to their experts and back; 0 for a dense model."""
        return self._int("exchange.layers")

    @cached_property
    def exchange_s_per_layer(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Chips that experts are spread over, ascending, and the seconds of the two exchanges of a layer there."""
        names = ("exchange.chips", "exchange.seconds_per_layer")
        chips, seconds = (tuple(map(float, self.constants[name].value)) for name in names)
        return chips, seconds

    @cached_property
    def speculation(self) -> SpeculationSpec:
        """What drafting brings and costs."""
        values = {name: self.constants[f"speculation.{name}"].value for name in CONSTANTS["speculation"]}
        vanilla = {name: values.pop(name) for name in list(values) if name.startswith("vanilla_")}
        baseline = {name.removeprefix("vanilla_"): value for name, value in vanilla.items()}
        return SpeculationSpec(**values, vanilla=VanillaSpec(kind=self.vanilla, **baseline))

    def scaled(self, factor: float) -> "Workload":
        """The same load per instance on `factor` times the instances, at least one and whole groups."""
        if not factor > 0:
            raise ConfigError("scale", f"is {factor}", "above 0")
        num_instances = max(1, round(self.num_instances * factor))
        num_groups = max(1, round(self.num_requests * num_instances / self.num_instances / self.group_size))
        changes = {
            "cluster.num_instances": num_instances,
            "requests.num_requests": num_groups * self.group_size,
        }
        return self.with_values(changes, note=f"scaled by {factor:g}") if factor != 1 else self

    def with_values(
        self, values: Mapping[str, int | float | tuple[int | float, ...]], *, note: str = "overridden"
    ) -> "Workload":
        """The same with other constants.

        Args:
            values: By `section.name`.
            note: Added to the source of each.

        Raises:
            ConfigError: For an unknown name, or a value that cannot be.
        """
        constants = dict(self.constants)
        for key, value in values.items():
            if key not in constants:
                raise ConfigError(key, "unknown constant", did_you_mean(key, constants))
            section, _, name = key.partition(".")
            checked = read_value(value, CONSTANTS[section][name], key, "")
            constants[key] = replace(constants[key], value=checked, source=f"{constants[key].source}; {note}")
        return replace(self, constants=constants)

    def _int(self, key: str) -> int:
        return int(self.constants[key].value)

    def _float(self, key: str) -> float:
        return float(self.constants[key].value)


def load_workload(name_or_path: str) -> Workload:
    """Load a workload that ships, such as `moonlight`, or a YAML file.

    Raises:
        ConfigError: If there is none, or something in it is unknown, missing or impossible; names the key and the file.
    """
    file = find_preset(name_or_path, workloads=True)
    values = read_yaml(file)
    where = f" in {file}"
    check_keys(values, {"chip", "vanilla", *CONSTANTS, "paper"}, {"trace"}, "", where)
    chip = read_choice(values["chip"], tuple(CHIPS), "chip", where)
    vanilla = read_choice(values["vanilla"], get_args(VanillaKind), "vanilla", where)
    trace = values.get("trace")
    if trace is not None and not isinstance(trace, str):
        raise ConfigError("trace", f"expected a file, got {trace!r}{where}", "a .npz or .jsonl file in quotes")
    constants = {}
    for section, rules in CONSTANTS.items():
        check_keys(values[section], set(rules), set(), section, where)
        for name, rule in rules.items():
            path = f"{section}.{name}"
            constants[path] = read_constant(values[section][name], rule, path, where)
    return Workload(
        name=file.stem,
        chip=chip,
        vanilla=vanilla,
        trace=trace,
        constants=constants,
        paper=_read_paper(values["paper"], where),
    )


def _read_paper(values: Any, where: str) -> Mapping[str, Mapping[str, float]]:
    if not isinstance(values, Mapping):
        raise ConfigError(
            "paper", f"expected figures by experiment, got {values!r}{where}", "`experiment: {name: 1.0}`"
        )
    paper = {}
    for experiment, figures in values.items():
        if not isinstance(figures, Mapping):
            raise ConfigError(f"paper.{experiment}", f"expected figures, got {figures!r}{where}", "`name: 1.0`")
        numbers = {name: read_number(figure) for name, figure in figures.items()}
        for name, number in numbers.items():
            if number is None:
                problem = f"expected a number, got {figures[name]!r}{where}"
                raise ConfigError(f"paper.{experiment}.{name}", problem, "without quotes or units")
        paper[experiment] = numbers
    return paper
