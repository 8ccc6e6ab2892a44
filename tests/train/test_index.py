"""The index of samples: what it answers, when it is made again, and several makers at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ShardError, SourceError
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.train.helpers import keys
from train.index import SampleIndex, ShardSamples, open_index, write_index
from train.shards import ShardSet


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def with_people(data: Path, column: str, values: list[str]) -> None:
    """Changes a column of identities.parquet, whose rows are in the order of samples."""
    path = data / "identities.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values)), path)


def only_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_an_index_is_made_once_and_answers_as_one_in_a_temporary_folder(
    data: Path, tmp_path: Path, shards: ShardSet
) -> None:
    first = ShardSet(str(data), "all", tmp_path)
    path = only_file(tmp_path)
    written = path.stat()
    second = ShardSet(str(data), "all", tmp_path)
    assert only_file(tmp_path).stat().st_ino == written.st_ino
    for each in (first, second):
        assert (each.digest, keys(each)) == (shards.digest, keys(shards))
        assert [each.place(n) for n in range(8)] == [shards.place(n) for n in range(8)]
        assert [each.number(key) for key in keys(shards)] == [*range(8)]
        assert each.number("nobody") is None
    with pytest.raises(IndexError):
        second.key(8)


def test_the_people_and_the_side_of_each_sample_come_from_the_global_pass(
    copy: Path, tmp_path: Path, shards: ShardSet
) -> None:
    with_people(copy, "identity_id", ["ann", "bob", "ann", "bob", "eva", "ann", "ann", "bob"])
    expected = [[2, 5, 6], [3, 7], [0, 5, 6], [1, 7], [], [0, 2, 6], [0, 2, 5], [1, 3]]
    whole = ShardSet(str(copy), "all", tmp_path / "index")
    assert [whole.others(number) for number in range(8)] == expected
    with_people(copy, "split", [*["train"] * 2, "val", *["train"] * 3, "val", "train"])
    train = ShardSet(str(copy), "train", tmp_path / "index")
    every = keys(shards)
    assert keys(train) == [every[number] for number in (0, 1, 3, 4, 5, 7)]
    assert [train.others(number) for number in range(6)] == [[4], [2, 5], [1, 5], [], [0], [1, 2]]
    assert train.number(every[2]) is None and train.number(every[7]) == 5
    assert keys(ShardSet(str(copy), "val", tmp_path / "index")) == [every[2], every[6]]
    assert len([*(tmp_path / "index").iterdir()]) == 3
    (copy / "identities.parquet").unlink()
    alone = ShardSet(str(copy), "all", tmp_path / "index")
    assert len(alone) == 8 and not any(alone.others(number) for number in range(8))
    with pytest.raises(SourceError, match=r"no identities\.parquet, so it isn't split yet"):
        ShardSet(str(copy), "train", tmp_path / "index")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not an index"),
        lambda path: pq.write_table(pa.table({"key": ["a"]}), path),
    ],
)
def test_a_damaged_index_is_made_again(
    data: Path, tmp_path: Path, shards: ShardSet, damage: Callable[[Path], object]
) -> None:
    ShardSet(str(data), "all", tmp_path)
    whole = only_file(tmp_path).read_bytes()
    damage(only_file(tmp_path))
    assert keys(ShardSet(str(data), "all", tmp_path)) == keys(shards)
    assert only_file(tmp_path).read_bytes() == whole


def test_an_index_of_the_format_without_sizes_can_still_be_read(
    data: Path, tmp_path: Path, shards: ShardSet
) -> None:
    ShardSet(str(data), "all", tmp_path)
    path = only_file(tmp_path)
    batch = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).get_batch(0)
    old = batch.drop_columns(["width", "height"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, old.schema) as writer:
        writer.write_batch(old)
    index = open_index(path, path.stem)
    assert index is not None and [index.key(number) for number in range(8)] == keys(shards)


def test_an_index_under_the_name_of_another_is_not_used(data: Path, tmp_path: Path) -> None:
    ShardSet(str(data), "all", tmp_path / "one")
    ShardSet(str(data), "train", tmp_path / "other")
    one, other = (only_file(tmp_path / name) for name in ("one", "other"))
    assert open_index(one, one.stem) is not None
    shutil.copy(other, one)
    assert open_index(one, one.stem) is None


def test_a_changed_data_set_has_an_index_of_its_own(copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    assert len(ShardSet(str(copy), "all", folder)) == 8
    (copy / "shards/fgid-000001.json").unlink()
    assert len(ShardSet(str(copy), "all", folder)) == 5
    assert len([*folder.iterdir()]) == 2


def test_a_tar_that_is_gone_is_an_error_although_there_is_an_index(
    copy: Path, tmp_path: Path
) -> None:
    ShardSet(str(copy), "all", tmp_path / "index")
    (copy / "shards/fgid-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"fgid-000001\.tar is missing"):
        ShardSet(str(copy), "all", tmp_path / "index")


def test_identities_in_another_order_than_their_shards_are_an_error(
    copy: Path, tmp_path: Path
) -> None:
    path = copy / "identities.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([7, *range(7)]), path)
    with pytest.raises(ShardError, match="not in the order of shards"):
        ShardSet(str(copy), "train")


def test_several_processes_make_an_index_at_once(
    data: Path, tmp_path: Path, shards: ShardSet
) -> None:
    def make() -> None:
        assert keys(ShardSet(str(data), "all", tmp_path)) == keys(shards)

    makers = [multiprocessing.get_context("fork").Process(target=make) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0] * 4
    assert keys(ShardSet(str(data), "all", tmp_path)) == keys(shards)
    only_file(tmp_path)


def test_a_maker_that_is_killed_leaves_only_what_is_swept(data: Path, tmp_path: Path) -> None:
    [*manifests] = DatasetReader(str(data)).manifests().values()

    def make() -> None:
        def shards() -> object:
            yield sample_shard(manifests[0], ["a"], [-1])
            time.sleep(60)

        write_index(tmp_path / "name.arrow", "name", shards(), whole=True)

    maker = multiprocessing.get_context("fork").Process(target=make)
    maker.start()
    while not [*tmp_path.iterdir()]:
        time.sleep(0.01)
    os.kill(maker.pid or 0, signal.SIGKILL)
    maker.join()
    only_file(tmp_path)
    Store(str(tmp_path.parent)).sweep(tmp_path.name)
    assert [*tmp_path.iterdir()] == []


def sample_shard(manifest: object, names: list[str], people: list[int]) -> ShardSamples:
    count = len(names)
    return ShardSamples(
        manifest=manifest,  # type: ignore[arg-type]
        key=names,
        offset=np.arange(count) * 512,
        size=np.full(count, 512),
        sha256=np.full((count, 32), 7, np.uint8),
        identity=np.array(people, np.int64),
        width=np.arange(count) + 1,
        height=np.arange(count) + 2,
    )


@settings(max_examples=30, deadline=None)
@given(
    people=st.lists(st.lists(st.sampled_from([-1, 0, 1, 2**40, 2**63 - 1]), max_size=9)),
    names=st.text(max_size=5),
)
def test_an_index_answers_as_lists_do(
    data: Path, tmp_path_factory: pytest.TempPathFactory, people: list[list[int]], names: str
) -> None:
    [manifest, *_] = DatasetReader(str(data)).manifests().values()
    path = tmp_path_factory.mktemp("index") / "name.arrow"
    listed = [
        [f"{names}{shard}/{row}" for row in range(len(each))] for shard, each in enumerate(people)
    ]
    shards = [sample_shard(manifest, *each) for each in zip(listed, people, strict=True)]
    write_index(path, "name", shards, whole=False)
    index = SampleIndex(path)
    every = [key for each in listed for key in each]
    identities = [person for each in people for person in each]
    assert [index.key(number) for number in range(len(index))] == every
    sizes = [(row + 1, row + 2) for each in people for row in range(len(each))]
    assert [*zip(*(each.tolist() for each in index.pixels()), strict=True)] == sizes
    for number, key in enumerate(every):
        assert index.number(key) == number
        assert index.others(number) == [
            other
            for other, person in enumerate(identities)
            if person == identities[number] != -1 and other != number
        ]
    assert index.number("another") is None
