"""Fixtures: a data set of eight portraits in three shards, made by the pipeline; models."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import DatasetConfig, SourceConfig
from tests.sharing import shared_folder
from tests.train.helpers import Parts, small
from train.shards import ShardSet


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, portraits: Path) -> Path:
    """The output of a data set run: eight samples in shards of 3, 3 and 2."""
    from pipelines.run import run

    def make(folder: Path) -> None:
        run(
            DatasetConfig(
                source=SourceConfig(path=str(portraits)),
                output=str(folder),
                shard_size=3,
                executor="inline",
                threads=1,
            )
        )

    return shared_folder(tmp_path_factory, "dataset", make)


@pytest.fixture(scope="session")
def shards(data: Path) -> ShardSet:
    return ShardSet(str(data))


@pytest.fixture(scope="session")
def built_parts(
    data: Path, tiny_base: Path, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> Parts:
    return Parts(small(data, tiny_base, tmp_path_factory.mktemp("parts")), shards)


@pytest.fixture
def parts(built_parts: Parts) -> Parts:
    """Models that the test may train."""
    return built_parts.copy()
