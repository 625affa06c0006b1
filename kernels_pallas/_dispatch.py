"""Choice among the implementations of a kernel."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax

F = TypeVar("F", bound=Callable)

PREFERRED = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
"""What serves a platform where it exists; elsewhere, and without it, the first implementation does."""

HOPPER = "9.0"
"""Compute capability of the GPUs that have wgmma, which `pallas_gpu` multiplies with."""

UNMEASURED = {"pallas_gpu"}
"""What serves only by name, until it has run on its platform and been faster than the first implementation."""


class KernelRefusedError(ValueError):
    """An implementation that was named cannot serve a call."""


def check_served(kernel: str, implementation: str, refusal: str | None) -> None:
    """Refuse a call that a named implementation cannot serve.

    Args:
        kernel: Name of the kernel.
        implementation: Its implementation.
        refusal: Why it cannot serve this call, in a few words; None if it can.

    Raises:
        KernelRefusedError: If there is a reason.
    """
    if refusal is not None:
        raise KernelRefusedError(f"{kernel}: {implementation} cannot serve this call: {refusal}")


@runtime_checkable
class Device(Protocol):
    """What is asked of a `jax.Device`; those of a GPU have a `compute_capability` too."""

    platform: str
    device_kind: str


def why_not_device(implementation: str, device: Device) -> str | None:
    """Say why an implementation does not run on a device, or None if it does.

    Args:
        implementation: Its name.
        device: The device.
    """
    if implementation in PREFERRED.values() and implementation != PREFERRED.get(device.platform):
        return f"{implementation} does not run on a {device.platform}"
    if implementation == "pallas_gpu" and (chip := getattr(device, "compute_capability", None)) != HOPPER:
        return f"pallas_gpu is for GPUs of compute capability {HOPPER} (Hopper), {device.device_kind} has {chip}"
    return None


class Choice(NamedTuple):
    """The implementation that serves a call for which none was named.

    Attributes:
        name: Its key.
        reason: Why, in a few words.
        is_fallback: Whether the platform's own implementation exists and refused.
    """

    name: str
    reason: str
    is_fallback: bool = False


def choose(implementations: Mapping[str, F], platform: str, refusals: Mapping[str, str | None] | None = None) -> Choice:
    """Choose for a platform.

    Args:
        implementations: What exists; the first is what serves where the platform has nothing of its own.
        platform: As `jax.default_backend()` names it.
        refusals: Why an implementation cannot serve the call; None or absent if it can.

    Returns:
        The choice and its reason.
    """
    first, own = next(iter(implementations)), PREFERRED.get(platform)
    if own is None:
        return Choice(first, f"best on {platform}")
    if own not in implementations:
        return Choice(first, f"there is no {own} yet")
    if own in UNMEASURED:
        return Choice(first, f"{own} must be named: it has never run on a {platform}")
    if refusals and (refusal := refusals.get(own)):
        return Choice(first, f"{own} cannot serve this call: {refusal}", is_fallback=True)
    return Choice(own, f"best on {platform}")


def select(
    kernel: str,
    implementations: Mapping[str, F],
    implementation: str | None,
    refusals: Mapping[str, str | None] | None = None,
) -> F:
    """Return the implementation that was named, or the best one of this platform for None.

    Args:
        kernel: Name of the kernel, for messages.
        implementations: What exists; the first serves where the platform has nothing of its own.
        implementation: A key of `implementations`; a named one never falls back. None chooses, and warns, once for
            each reason, if the platform's own implementation cannot serve the call.
        refusals: Why an implementation cannot serve this call; None or absent if it can.

    Returns:
        The function to call.

    Raises:
        ValueError: If there is no implementation of that name.
    """
    if implementation is None:
        choice = choose(implementations, jax.default_backend(), refusals)
        if choice.is_fallback:
            _warn_once(f"{kernel}: {choice.name} serves instead, because {choice.reason}")
        return implementations[choice.name]
    if implementation not in implementations:
        raise ValueError(f"{kernel}: no implementation {implementation!r}, there are {', '.join(implementations)}")
    return implementations[implementation]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
