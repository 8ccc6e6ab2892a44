"""Fixtures of the executors' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.run import run
from tests.pipelines.helpers import config, digests


@pytest.fixture(scope="module")
def expected(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """File name → digest, of an uninterrupted inline run that writes four shards."""
    output = tmp_path_factory.mktemp("expected")
    run(config(portraits, output, "shard_size=2"))
    return digests(output)
