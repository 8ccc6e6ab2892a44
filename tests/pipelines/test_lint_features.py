"""Lint of features: those of removed samples, of other samples and of damaged files are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.lint import lint
from pipelines.takedown import by_source, statements, take_down
from stages.record import Record
from stages.storage import layout
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.stub_chain import Scene, stub_chain
from tests.pipelines.takedown.helpers import make, settings_of

KIND = "features/vae-0123456789abcdef"


def add_features(store: Store, *more: str) -> None:
    """Commits features of all samples, as `make features` does. more: keys beside the first
    shard's samples.
    """
    reader = DatasetReader(store)
    for index, manifest in reader.manifests().items():
        keys = [*(r.key for r in reader.records(index) if r.ok), *(more if not index else ())]
        commit(
            Store(f"{store.url}/{KIND}"),
            PlannedShard(index=index, inputs=len(keys), bytes=0, digest=manifest.tar.sha256),
            [Record(key=key, source="", image=b"numbers") for key in keys],
            ChainInfo((), ()),
            manifest.run,
            lambda record, _: {"npy": record.image},
        )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A data set of four people in two shards, with features."""
    store = make(tmp_path, {name: Scene(person=name) for name in ("ann", "ben", "cleo", "dan")})
    add_features(store)
    return store


def remove(store: Store, folder: Path, name: str) -> str:
    """Takes down an image; returns its key."""
    [match] = matches = by_source(store, name)
    take_down(store, settings_of(folder), matches, "source", "", chain=stub_chain)
    return match.key


def faults(store: Store, fast: bool = False) -> list[str]:
    return [*lint(store, fast=fast)]


def test_features_of_the_present_samples_are_no_fault(store: Store) -> None:
    assert faults(store) == faults(store, fast=True) == []


def test_features_of_a_removed_person_are_gone_and_found_if_they_are_put_back(
    store: Store, tmp_path: Path
) -> None:
    shards = Path(store.path(f"{KIND}/{layout.SHARDS}"))
    before = Path(shutil.copytree(shards, tmp_path / "before"))
    key = remove(store, tmp_path, "ann.jpg")
    assert faults(store) == faults(store, fast=True) == []
    assert not any(key.encode() in path.read_bytes() for path in shards.iterdir())
    assert "No tar, sidecar, features or identities.parquet has data" in next(statements(store))

    shutil.copytree(before, shards, dirs_exist_ok=True)
    [line] = faults(store, fast=True)
    shard = f"{KIND}/shards/fgid-000000"
    assert line.startswith(f"{shard}.json: the features of this shard were made of other samples")
    assert line.endswith(f"Delete {shard}.*; make features computes what is missing.")
    for name in ("tar", "parquet"):
        assert any(
            text.startswith(f"{shard}.{name} has features of {key}: taken down")
            for text in faults(store)
        )
    assert len(faults(store)) == 3


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_files_that_a_killed_run_left_are_read_too(
    store: Store, tmp_path: Path, share: float
) -> None:
    shards = Path(store.path(f"{KIND}/{layout.SHARDS}"))
    tar = (shards / "fgid-000000.tar").read_bytes()
    key = remove(store, tmp_path, "ann.jpg")
    partial = shards / ".fgid-000000.tar.tmp-01234567"
    partial.write_bytes(tar[: int(len(tar) * share)])
    [line] = faults(store)
    assert line.startswith(f"{KIND}/shards/{partial.name} has features of {key}: taken down")
    assert f"Delete {KIND}/shards/{partial.name};" in line


def test_keys_that_are_no_samples_are_named_unless_the_samples_are_not_known(
    store: Store,
) -> None:
    others = [f"{number:020x}" for number in range(5)]
    add_features(store, *others)
    assert faults(store, fast=True) == []
    lines = faults(store)
    assert len(lines) == 2
    for line in lines:
        expected = f"has features of {', '.join(others[:3])} and 2 more: not a sample"
        assert expected in line
    store.remove("shards/fgid-000001.parquet")
    lines = faults(store)
    assert any("fgid-000001.parquet is missing" in line for line in lines)
    assert not any(KIND in line for line in lines)


def test_damaged_files_of_features_are_named(store: Store) -> None:
    shards = Path(store.path(f"{KIND}/{layout.SHARDS}"))
    tar = shards / "fgid-000000.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    (shards / "fgid-000001.json").write_text("{")
    lines = faults(store)
    assert any("fgid-000000.tar can't be read to its end" in line for line in lines)
    assert any(f"{KIND}/shards/fgid-000001.json" in line for line in lines)
    assert len(lines) == 2
