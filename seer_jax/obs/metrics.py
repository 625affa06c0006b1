"""Metrics as JSON lines: one object per line, readable at any moment, by anything."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class MetricsWriter:
    """Appends records to a `metrics.jsonl`.

    Every line is flushed, so that the file is whole after Ctrl-C. Use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, keeping what it holds."""
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            record: Numbers (also numpy's), text, lists and mappings of them.

        Raises:
            TypeError: If a value is none of these, such as a device array.
        """
        self._file.write(to_json_line(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the records after an iteration, so that a run resumed there does not hold later iterations twice.

    Args:
        path: A `metrics.jsonl`; may be missing.
        iteration: Last iteration whose record is kept.
    """
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
        path.write_text("".join(kept), encoding="utf-8")


def to_json_line(record: Mapping[str, Any]) -> str:
    """Write a record as one line of strict JSON; NaN and infinities, which JSON lacks, become null.

    Raises:
        TypeError: If a value is neither number, text, list nor mapping.
    """
    return json.dumps(_plain(record), allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
