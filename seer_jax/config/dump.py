"""A configuration as YAML."""

from dataclasses import asdict
from typing import Any

import yaml


def to_yaml(config: Any) -> str:
    """Write all settings, defaults included, in the order of their declaration.

    Invariants:
        Decoding the text gives an equal configuration.
    """
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)
