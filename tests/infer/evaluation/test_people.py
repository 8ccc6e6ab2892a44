"""Held-out people: which are chosen, and in which order their samples are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, ShardError
from infer.evaluation.people import held_out_people, of_another
from stages.storage.reader import DatasetReader


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, where two samples are of one person each, and three people are held out."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    shutil.copytree(data, folder)
    rows = pq.read_table(folder / "identities.parquet").to_pylist()
    rows.sort(key=lambda row: row["key"])
    for number, row in enumerate(rows):
        row["identity_id"] = f"id-{number // 2}"
        row["split"] = "val" if number < 6 else "train"
    schema = pq.read_schema(folder / "identities.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "identities.parquet")
    return folder


def test_people_of_one_side_are_chosen_by_the_seed(pairs: Path) -> None:
    reader = DatasetReader(str(pairs))
    every = held_out_people(reader, 3, seed=1, samples=2)
    assert {person.name for person in every} == {"id-0", "id-1", "id-2"}
    for person in every:
        sources = [record.source for record in person.records]
        assert len(sources) == 2 and sources == sorted(sources)
        assert all(record.complete for record in person.records)
        assert person.reference is person.records[0] and person.another is person.records[1]
    names = [person.name for person in every]
    assert [person.name for person in held_out_people(reader, 2, seed=1)] == names[:2]
    orders = {
        tuple(person.name for person in held_out_people(reader, 3, seed=seed)) for seed in range(6)
    }
    assert len(orders) > 1
    [train] = held_out_people(reader, 1, seed=1, split="train")
    assert train.name == "id-3"
    assert len(held_out_people(reader, 4, seed=1, split="all")) == 4


def test_too_few_people_are_an_error_with_the_numbers(pairs: Path) -> None:
    reader = DatasetReader(str(pairs))
    with pytest.raises(ConfigError, match=r"4 people with at least 2 samples .* has 3 on the side"):
        held_out_people(reader, 4, seed=1, samples=2)
    with pytest.raises(ConfigError, match="has 0"):
        held_out_people(reader, 1, seed=1, samples=3)
    with pytest.raises(ConfigError, match="1 people are given"):
        of_another(["a"])


def test_a_sample_that_is_not_in_its_shard_is_an_error(
    data: Path, tmp_path: Path, pairs: Path
) -> None:
    shutil.copytree(pairs, tmp_path / "data")
    path = tmp_path / "data" / "identities.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["key"] = "0" * 20
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    with pytest.raises(ShardError, match=r"1 samples .* the first is 00000000000000000000"):
        held_out_people(DatasetReader(str(tmp_path / "data")), 4, seed=1, split="all")


def test_everybody_gets_another_person() -> None:
    names = ["a", "b", "c"]
    others = of_another(names)
    assert sorted(others.values()) == names and all(name != other for name, other in others.items())
