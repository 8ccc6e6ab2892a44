"""The person whom the source states: the identity, the split, changes of it, and its removal.

`IncrementalDataSet` compares each output with that of a fresh run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.quality import GlobalPassConfig
from pipelines.dedup.global_pass import named_identities, near_identities
from pipelines.planning.resume import load_shard
from pipelines.run import plan_job
from pipelines.takedown import Removals
from stages.record import key_of
from stages.storage import layout
from stages.storage.sidecar import Row
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.incremental import run as run_pipeline
from tests.pipelines.stub_chain import OUTAGE, Scene, stub_chain
from train.shards import ShardSet

ANN, ANN_TWO, ANN_THREE = (Scene(person="ann", shot=shot).encode() for shot in (1, 2, 3))
BOB, CAT, DAN = (Scene(person=person).encode() for person in ("bob", "cat", "dan"))


@pytest.fixture
def data(tmp_path: Path) -> IncrementalDataSet:
    """One face under two names, two faces under one, and faces without a name."""
    data = IncrementalDataSet(tmp_path / "data")
    data.change(person_folder=True)
    for name, scene in (
        ("a-loose.jpg", ANN_THREE),
        ("eve/2.jpg", ANN_TWO),
        ("eve/3.jpg", BOB),
        ("ida/1.jpg", ANN),
        ("z/_others/cat.jpg", CAT),
    ):
        data.put(name, scene)
    return data


def identities(data: IncrementalDataSet) -> dict[str, Row]:
    """Returns the name of each sample's input → its row of identities.parquet."""
    rows = {row["key"]: row for row in data.reader.identities().to_pylist()}
    return {name: rows[key_of(name)] for name in data.planned if key_of(name) in rows}


def test_a_stated_person_is_one_identity_whatever_the_faces_say(data: IncrementalDataSet) -> None:
    data.run()
    rows = identities(data)
    first, two, three, ida, last = (row["identity_id"] for row in rows.values())
    assert two == three and len({first, two, ida, last}) == 4
    assert rows["eve/2.jpg"]["split_group"] == rows["eve/3.jpg"]["split_group"]
    assert key_of("ida/1.jpg") in rows["eve/2.jpg"]["nearest"], "faces alike are still neighbours"
    shards = ShardSet(str(data.output))
    assert sorted(map(len, map(shards.others, range(5)))) == [0, 0, 0, 1, 1], "pairs to train on"


def test_identity_and_side_of_a_person_never_change(data: IncrementalDataSet) -> None:
    data.run()
    before = identities(data)
    for number, scene in enumerate((DAN, Scene(person="ann", shot=9).encode())):
        data.put(f"eve/0-{number}.jpg", scene)
    data.run()
    data.take_down("source", "eve/2.jpg")
    data.run()
    after = identities(data)
    assert "eve/2.jpg" not in after and len(after) == 6
    for name in {*before} & {*after}:
        for column in ("identity_id", "split_group", "split"):
            assert after[name][column] == before[name][column], (name, column)
    eve = {row["identity_id"] for name, row in after.items() if name.startswith("eve/")}
    assert eve == {before["eve/2.jpg"]["identity_id"]}


def test_samples_without_a_person_are_clustered_as_if_there_were_no_others() -> None:
    rng = np.random.default_rng(0)
    face = np.eye(8, dtype=np.float32)[0]
    vectors = face + 0.05 * rng.standard_normal((12, 8)).astype(np.float32)
    vectors[10:] = face + 0.9 * np.eye(8, dtype=np.float32)[1:3]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = GlobalPassConfig(nearest=5, identity_similarity=0.5)
    keys = [f"{number:020x}" for number in range(12)]
    near = near_identities(vectors, config)
    assert not {*near.row[10].tolist()} & {11}, "or this tests nothing"
    names, groups = named_identities(keys, ["Ada"] * 10 + [""] * 2, vectors, near, config)
    assert names[10:] == ["id-000000000000"] * 2 and groups[10:] == ["group-000000000000"] * 2
    assert len({*names}) == 2
    alone, _ = named_identities(
        keys[10:], [""] * 2, vectors[10:], near_identities(vectors[10:], config), config
    )
    assert alone == names[10:]


def test_a_person_who_is_stated_later_is_noticed_and_no_stage_runs(
    data: IncrementalDataSet,
) -> None:
    data.change(person_folder=False)
    data.run()
    assert len({row["identity_id"] for row in identities(data).values()}) == 3
    data.change(person_folder=True)
    job = plan_job(data.config, chain=stub_chain)
    assert job.plan.changed == 3, "of two files no person is stated"
    loaded = [
        each
        for task in job.tasks
        for each in load_shard(
            data.config, data.store, task, job.stages, job.plan.inputs_of(task.index)
        )
    ]
    assert {each.record.person for each in loaded} == {"ida", "eve", ""}
    assert not any(each.remaining_stages for each in loaded)
    data.run()
    assert len({row["identity_id"] for row in identities(data).values()}) == 4
    data.change(person_folder=False)
    data.run()
    assert len({row["identity_id"] for row in identities(data).values()}) == 3


def test_a_changed_column_is_noticed(tmp_path: Path) -> None:
    (tmp_path / OUTAGE).write_text("[]")
    data = IncrementalDataSet(tmp_path / "data")
    table = tmp_path / "in.parquet"
    source = replace(data.config.source, path=str(table), name_column="name")
    config = replace(data.config, source=source)

    def people(*stated: str | None) -> list[str]:
        rows = [
            {"name": f"{at}.jpg", "image": scene, "person": person}
            for at, (scene, person) in enumerate(zip((ANN, BOB, CAT), stated, strict=True))
        ]
        pq.write_table(pa.Table.from_pylist(rows), table)
        run_pipeline(config)
        return [row["person"] for row in data.reader.rows(0).to_pylist()]

    assert people(None, "Ada", "Bea") == ["", "Ada", "Bea"]
    assert people("Bea", "Ada", None) == ["Bea", "Ada", ""]
    assert len(data.reader.identities().column("identity_id").unique()) == 3


def test_nothing_of_a_person_is_left_after_a_take_down(data: IncrementalDataSet) -> None:
    data.put("Ada Lovelace/6.jpg", DAN)
    data.run()
    [ada] = [row["identity_id"] for name, row in identities(data).items() if "Ada" in name]
    data.take_down("source", "Ada Lovelace/*")
    data.remove("Ada Lovelace/6.jpg")
    data.run()
    tables = [data.store.table(name) for name in (layout.PLAN, layout.IDENTITIES)]
    tables += [data.reader.rows(index) for index in data.reader.manifests()]
    text = json.dumps([table.to_pylist() for table in tables], default=repr)
    for path in data.output.rglob("*"):
        text += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert "eve" in text and "Lovelace" not in text and ada not in text


def test_lint_finds_the_person_of_a_removed_record(data: IncrementalDataSet) -> None:
    data.run()
    data.take_down("source", "ida/1.jpg")
    [index] = [
        index
        for index in data.reader.manifests()
        if key_of("ida/1.jpg") in data.reader.rows(index).column("key").to_pylist()
    ]
    path = data.output / layout.in_shards(layout.sidecar(index))
    table = pq.read_table(path)
    people = [person or "ida" for person in table.column("person").to_pylist()]
    at = table.schema.get_field_index("person")
    pq.write_table(table.set_column(at, table.schema.field(at), [people]), path)
    manifest, removals = data.reader.manifests()[index], Removals.of(data.store)
    with data.reader.sidecar(index) as sidecar:
        [line] = removals.rows_left(manifest, sidecar)
    assert f"{key_of('ida/1.jpg')} was taken down, but its row still has data" in line
