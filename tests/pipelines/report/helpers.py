"""Shared by the tests of the report: small data sets, their rows and stats, the page's counter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.storage.layout import STATS
from stages.storage.store import Store
from tests.pipelines.report.report_data import Recipe, write_set

Open = Callable[..., Any]  # see the fixture open_page

needs_chromium = pytest.mark.skipif(
    not shutil.which("chromium") and "CI" not in os.environ,
    reason="needs chromium; CI fails without",
)


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


def small_set(folder: Path, **changes: Any) -> Store:
    """A synthetic data set of one shard with 30 inputs, and no report. changes: to its recipe."""
    recipe = Recipe(**{"shards": 1, "rows": 30, "variants": 4} | changes)
    return Store(str(write_set(folder / "out", recipe)))


def stats_of(store: Store) -> dict[str, Any]:
    """The content of report/stats.json."""
    stats: dict[str, Any] = json.loads(store.read(STATS))
    return stats


def count(page: Any) -> str:
    page.wait_for_function("() => document.getElementById('count').textContent !== ''")
    return str(page.inner_text("#count"))


def wait_count(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.getElementById('count').textContent === text", arg=text
    )


def records(number: int) -> str:
    return f"{number:,} record{'s' if number != 1 else ''}"
