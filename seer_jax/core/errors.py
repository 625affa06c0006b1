"""The errors of seer_jax.

Everything a user can cause is a `ConfigError` or a `CapacityError` and is raised at the edges, before anything
heavy starts. `ProtocolError` means a bug of ours: an invariant between driver, instance and learner was broken.
"""

import copyreg


class SeerError(Exception):
    """Base of every error that seer_jax raises on purpose; survives pickling, as it may come from another process."""

    def __reduce__(self) -> tuple:
        """Rebuild from the message and the attributes, not by calling `__init__`, whose arguments are gone."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)


class ConfigError(SeerError):
    """A value that the user gave is wrong; names the field, the value and the fix.

    Args:
        path: Dotted path of the field, as on the command line (`engine.num_pages`); of what is no setting, the class
            and its argument (`SpeculationArgs.top_k`).
        message: What is wrong, with the value in it.
        hint: What to do about it.
    """

    def __init__(self, path: str, message: str, hint: str = "") -> None:
        self.path, self.message, self.hint = path, message, hint
        super().__init__(f"{path}: {message}" + (f" ({hint})" if hint else ""))


class CapacityError(SeerError):
    """Something can never fit; says how much is needed and how much there is."""

    def __init__(self, what: str, needed: int, available: int, unit: str, hint: str = "") -> None:
        self.needed, self.available = needed, available
        super().__init__(f"{what} needs {needed} {unit}, only {available} exist" + (f" ({hint})" if hint else ""))


class InstanceLostError(SeerError):
    """No instance is left to run the remaining requests."""


class TransferError(SeerError):
    """A KV block could not be fetched; the caller re-prefills from the tokens."""


class ProtocolError(SeerError):
    """A message that breaks the protocol, such as a sample of an older policy version: a bug, never user input."""
