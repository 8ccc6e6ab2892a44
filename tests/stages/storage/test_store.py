"""The store on a file system: no partial files, and errors for files that can't be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import StoreError
from stages.storage.store import Store

# writes a file that is too large for its limit on file sizes, and prints the error
_WRITER = """
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


def test_a_file_that_is_too_large_is_an_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _WRITER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith(
        f"StoreError: {tmp_path}/large can't be written: File too large. Free disk space"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_output_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match=r"out/dataset\.json can't be written: File exists"):
        Store(str(tmp_path / "out")).write("dataset.json", "{}")
    assert (tmp_path / "out").read_text() == "mine"
