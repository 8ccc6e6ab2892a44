"""Fixtures: models, without a Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.helpers import Parts, small
from train.shards import ShardSet


@pytest.fixture(scope="session")
def built_parts(
    data: Path, tiny_base: Path, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> Parts:
    return Parts(small(data, tiny_base, tmp_path_factory.mktemp("parts")), shards)


@pytest.fixture
def parts(built_parts: Parts) -> Parts:
    """Models that the test may train."""
    return built_parts.copy()
