"""Fixtures: models, without a Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from configs.schema import DatasetConfig, SourceConfig
from configs.training import DataSource
from pipelines.run import run as make_dataset
from tests.bases import read_once
from tests.sharing import shared_folder

# fixtures
from tests.stages.storage.conftest import bucket, server_and_client, short_pauses  # noqa: F401
from tests.train.featured import LONG, make, paired, rewrite, without_a_mouth
from tests.train.helpers import Parts, hold_out, small, with_people
from train import setup
from train.mixture import Mixture
from train.shards import ShardSet

# of the portraits: three are narrow, three wide and two square
CROPS = [(640, 1024)] * 3 + [(1024, 640)] * 3 + [(1024, 1024)] * 2


@pytest.fixture(scope="package", autouse=True)
def _base_read_once() -> Iterator[None]:
    with read_once(setup):
        yield


@pytest.fixture(scope="session")
def built_parts(
    data: Path, tiny_base: Path, mixture: Mixture, tmp_path_factory: pytest.TempPathFactory
) -> Parts:
    return Parts(small(data, tiny_base, tmp_path_factory.mktemp("parts")), mixture)


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
    place = shards.place(2)
    content[place.offset + place.size // 2] ^= 1
    tar.write_bytes(content)
    return copy


class Mixed(NamedTuple):
    """Three data sets with people who have several samples. people: a letter for each sample."""

    sources: tuple[DataSource, ...]
    people: tuple[str, ...]


@pytest.fixture(scope="session")
def mixed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Data sets of 8, 5 and 8 samples, with weights. A portrait has the same key in all of them."""
    folder = tmp_path_factory.mktemp("mixed")
    with_people(data, folder / "one", "abababcc")
    with_people(data, folder / "two", "aab...bc", without_shard=1)
    with_people(data, folder / "three", "aaaabcde")
    weights = {"one": 3, "two": 1, "three": 2}
    return Mixed(
        tuple(DataSource(path=str(folder / name), weight=w) for name, w in weights.items()),
        ("abababcc", "aabbc", "aaaabcde"),
    )


@pytest.fixture(scope="session")
def held_out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three people, of whom b and c are on the validation side."""
    return hold_out(
        with_people(data, tmp_path_factory.mktemp("held-out") / "data", "aaaabbcc"), "b", "c"
    )


@pytest.fixture(scope="session")
def people(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of people with several photographs and long descriptions. Some show
    no mouth, so a sample's text depends on its reference.
    """
    folder = with_people(data, tmp_path_factory.mktemp("people") / "data", "abababcc")
    samples = ShardSet(str(folder))
    chosen = {samples.key(number) for number in range(0, len(samples), 3)}
    rewrite(
        folder,
        lambda record: (
            without_a_mouth(record) if record.key in chosen else replace(record, face_caption=LONG)
        ),
    )
    return folder


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory, portraits: Path) -> Path:
    """A data set of the portraits, cropped to CROPS."""

    def make(folder: Path) -> None:
        cropped = folder / "images"
        cropped.mkdir()
        for path, (width, height) in zip(sorted(portraits.glob("*.*")), CROPS, strict=True):
            image = Image.open(path)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image.crop((left, top, left + width, top + height)).save(cropped / f"{path.stem}.png")
        source, output = SourceConfig(path=str(cropped)), str(folder / "data")
        make_dataset(
            DatasetConfig(source=source, output=output, shard_size=3, executor="inline", threads=1)
        )

    return shared_folder(tmp_path_factory, "shaped", make) / "data"


@pytest.fixture(scope="session")
def featured(people: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of people with float32 features of all kinds, made by one process."""
    folder = Path(shutil.copytree(people, tmp_path_factory.mktemp("featured") / "data"))
    make(paired(folder, tiny_base, folder / "none"))
    return folder
