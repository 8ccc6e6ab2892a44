"""Fixtures of the executors' tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.run import run
from tests.pipelines.helpers import config, digests
from tests.sharing import shared_folder
from tests.stages.executors.stopped import FOUR_SHARDS


@pytest.fixture(scope="session")
def expected(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """File name → digest, of an uninterrupted inline run that writes four shards."""
    output = shared_folder(
        tmp_path_factory, "expected", lambda folder: run(config(portraits, folder, *FOUR_SHARDS))
    )
    return digests(output)


@pytest.fixture(scope="session")
def four(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the first four portraits."""
    folder = tmp_path_factory.mktemp("four")
    for path in sorted(portraits.iterdir())[:4]:
        shutil.copy(path, folder)
    return folder
