"""What the driver wants done. The runtime (simulated, in-process, Ray) carries commands out in order."""

from dataclasses import dataclass

from seer_jax.core.types import RequestChunk, Sample


@dataclass(frozen=True, kw_only=True)
class StartChunk:
    """Send a chunk to an instance."""

    instance_id: int
    chunk: RequestChunk


@dataclass(frozen=True, kw_only=True)
class EmitSample:
    """A request is finished; hand its response to the reward."""

    sample: Sample


@dataclass(frozen=True, kw_only=True)
class IterationDone:
    """Every request of the iteration is finished."""


Command = StartChunk | EmitSample | IterationDone
