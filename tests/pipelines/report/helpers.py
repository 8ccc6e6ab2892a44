"""Shared by the tests of the report: the rows of a data set's sidecars as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all sidecars, in order."""
    paths = sorted(folder.glob("shards/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def plain(value: Any) -> Any:
    """A record of mlcroissant in the form of pyarrow's rows: bytes as text, arrays as lists, and
    structs with the last part of their fields' names."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key.rsplit("/", 1)[-1]: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    return value
