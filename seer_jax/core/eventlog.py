"""Events and commands as plain JSON, so that a recorded run replays to the same commands.

A log is one encoded event a line, in the order in which the driver handled them. Commands follow from the events and
need no recording.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from seer_jax.core.commands import Command, EmitSample, IterationDone, StartChunk
from seer_jax.core.driver import RolloutDriver
from seer_jax.core.errors import InstanceLostError, ProtocolError
from seer_jax.core.events import ChunkFinished, Event, GroupsSubmitted, InstanceJoined, InstanceLost, InstanceReport
from seer_jax.core.types import (
    InstanceInfo,
    InstanceStatus,
    KVHandle,
    RequestChunk,
    RequestId,
    RolloutGroup,
    Sample,
    SamplingParams,
)

_EVENTS = (InstanceJoined, InstanceLost, GroupsSubmitted, ChunkFinished, InstanceReport)
_COMMANDS = (StartChunk, EmitSample, IterationDone)
_PARTS = (InstanceInfo, InstanceStatus, KVHandle, RequestChunk, RolloutGroup, Sample, SamplingParams)
_CLASSES = {cls.__name__: cls for cls in (*_EVENTS, *_COMMANDS, *_PARTS)}
_DTYPES = {"token_ids": np.int32, "prompt_token_ids": np.int32, "logprobs": np.float32, "expert_ids": np.int16}


def encode_event(event: Event) -> dict[str, Any]:
    """Turn an event into a JSON object. The `ref` of a KV handle is dropped: it means nothing to another process."""
    return _encode(event)


def decode_event(data: dict[str, Any]) -> Event:
    """Turn what `encode_event` gave back into an event.

    Raises:
        ProtocolError: If it is no event or has other fields than this version's.
    """
    return _decode_as(data, _EVENTS)


def encode_command(command: Command) -> dict[str, Any]:
    """Turn a command into a JSON object; equal objects mean equal commands, whatever a KV handle's `ref`."""
    return _encode(command)


def decode_command(data: dict[str, Any]) -> Command:
    """Turn what `encode_command` gave back into a command.

    Raises:
        ProtocolError: If it is no command or has other fields than this version's.
    """
    return _decode_as(data, _COMMANDS)


def decode_events(lines: Iterable[str]) -> Iterator[Event]:
    """Read a log.

    Args:
        lines: JSON lines of `encode_event`; blank ones are skipped.

    Raises:
        ProtocolError: If a line is no event.
    """
    for line in lines:
        if line.strip():
            yield decode_event(json.loads(line))


def replay(events: Iterable[Event], driver: RolloutDriver) -> Iterator[Command]:
    """Feed a recorded run to a driver and give the commands as they come.

    Args:
        events: What happened, in order.
        driver: A fresh driver with the policy and estimator of the recorded run.
    """
    for event in events:
        try:
            yield from driver.handle(event)
        except InstanceLostError:
            continue  # Booked; in the recorded run another instance joined, or it ended here.


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if is_dataclass(value):
        data = {field.name: _encode(getattr(value, field.name)) for field in fields(value) if field.name != "ref"}
        return {"type": type(value).__name__} | data
    return value


def _decode_as(data: dict[str, Any], classes: tuple[type, ...]) -> Any:
    value = _decode(data)
    if not isinstance(value, classes):
        raise ProtocolError(f"{type(value).__name__} is none of {', '.join(cls.__name__ for cls in classes)}")
    return value


def _decode(data: dict[str, Any]) -> Any:
    cls = _CLASSES.get(data.get("type", ""))
    if cls is None:
        raise ProtocolError(f"unknown type {data.get('type')!r} in an event log")
    names = {field.name for field in fields(cls)} - {"ref"}
    if names != data.keys() - {"type"}:
        raise ProtocolError(f"{cls.__name__} in an event log has fields {sorted(data)}, not {sorted(names)}")
    return cls(**{name: _decode_field(name, data[name]) for name in names})


def _decode_field(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _decode(value)
    if name in _DTYPES and value is not None:
        return np.asarray(value, _DTYPES[name])
    if name == "request_id":
        return RequestId(*value)
    if name == "groups":
        return tuple(_decode(item) for item in value)
    return tuple(value) if isinstance(value, list) else value
