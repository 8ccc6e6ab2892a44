"""Files that all tests of a run share: made once, though pytest-xdist runs several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """A folder that `make` fills, once in a run of pytest: one worker makes it, the others wait.

    Tests read it and never write to it.
    """
    own = factory.getbasetemp()
    workers = own.name.startswith("popen-")  # the base folder of each is inside that of the run
    folder = (own.parent if workers else own) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    complete = folder.with_name(f"{name}.complete")
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a worker that failed has left
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder
