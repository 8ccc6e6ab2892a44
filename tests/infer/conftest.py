"""Fixtures: adapters over the tiny base, a generator with one of them, and two people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infer import load
from infer.generator import ConsistentIDGenerator
from infer.identity import Identity
from infer.load import load_generator
from tests.bases import read_once
from tests.infer.helpers import small, write_adapter


@pytest.fixture(scope="package", autouse=True)
def _base_read_once() -> Iterator[None]:
    with read_once(load):
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """OUT of a training run, with the base that it made."""
    output = tmp_path_factory.mktemp("trained")
    (output / "base").symlink_to(tiny_base)
    return output


@pytest.fixture(scope="session")
def adapter(trained: Path) -> Path:
    return write_adapter(trained / "base", trained / "final", "corrected")


@pytest.fixture(scope="session")
def legacy_adapter(trained: Path) -> Path:
    return write_adapter(trained / "base", trained / "legacy", "legacy")


@pytest.fixture(scope="session")
def generator(adapter: Path) -> ConsistentIDGenerator:
    return load_generator(small(adapter))


@pytest.fixture(scope="session")
def photo(portraits: Path) -> Path:
    return sorted(portraits.glob("*.jpg"))[0]


@pytest.fixture(scope="session")
def person(generator: ConsistentIDGenerator, photo: Path) -> Identity:
    return generator.identity(photo)


@pytest.fixture(scope="session")
def stranger(generator: ConsistentIDGenerator, portraits: Path) -> Identity:
    return generator.identity(sorted(portraits.glob("*.jpg"))[1])
