"""The store on a file system: files whole or not at all, and what it says where it can't write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import StoreError
from stages.storage.store import Store

_FILLS = """
import resource, sys
from stages.storage.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = Store(sys.argv[1])
store.write("small", b"." * 1000)
try:
    store.write("large", b"." * 1001)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_file_with_no_room_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FILLS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        f"StoreError: {tmp_path}/large can't be written: File too large. Make room"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_output_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match=r"out/dataset\.json can't be written: File exists"):
        Store(str(tmp_path / "out")).write("dataset.json", "{}")
    assert (tmp_path / "out").read_text() == "mine"
