"""The store on a file system: no partial files, and errors for files that can't be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


SIZE = 40_000_000  # bytes; several times the largest request


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of different contents, larger than several requests together."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("a", "b"):
        with (folder / name).open("wb") as file:
            for start in range(0, SIZE, 262_144):
                file.seek(start)
                file.write(f"{name} at {start}".encode())
            file.truncate(SIZE)
    return folder


RANGES = st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 4_000_000))


@settings(max_examples=40, deadline=None)
@given(ranges=st.lists(RANGES, max_size=8))
def test_ranges_that_are_read_together_have_their_own_bytes(
    large: Path, ranges: list[tuple[str, int, int]]
) -> None:
    asked = [(name, step * 131_072, step * 131_072 + size) for name, step, size in ranges]
    assert Store(str(large)).read_ranges(asked) == [
        large_part(large / name, start, end) for name, start, end in asked
    ]


def large_part(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
