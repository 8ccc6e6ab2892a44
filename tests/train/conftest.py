"""Fixtures: models, without a Trainer."""

from __future__ import annotations

import shutil
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


@pytest.fixture
def damaged(data: Path, tmp_path: Path) -> Path:
    """The data set, with one byte of its third sample changed."""
    copy = Path(shutil.copytree(data, tmp_path / "damaged"))
    shards = ShardSet(str(copy))
    tar = copy / "shards" / shards.shard_of(2)
    content = bytearray(tar.read_bytes())
    offset, size = shards._spans[2]
    content[offset + size // 2] ^= 1
    tar.write_bytes(content)
    return copy
