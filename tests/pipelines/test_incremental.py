"""Short histories of a data set after which the output once differed from a fresh run's, or still
held data of a removed input. `IncrementalDataSet` compares after each run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.load import to_yaml
from pipelines.lint import lint
from pipelines.run import execute, plan_job
from stages.record import key_of
from stages.storage import layout
from stages.storage.exclusions import read_takedowns
from stages.storage.sidecar import Row, is_quarantined
from tests.pipelines import incremental, sigkill
from tests.pipelines.helpers import rows_of
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import OUTAGE, Scene, stub_chain

ANN = Scene(person="ann").encode()
ANN_AGAIN = Scene(person="ann", saved=1).encode()
BLURRED = Scene(person="ann", sharpness=0.2).encode()
BOB = Scene(person="bob").encode()
CAT = Scene(person="cat").encode()


@pytest.fixture
def data(tmp_path: Path) -> IncrementalDataSet:
    return IncrementalDataSet(tmp_path / "data")


def taken_down(data: IncrementalDataSet) -> set[str]:
    keys = {
        key
        for entry in read_takedowns(data.store)
        for part in entry["removed"].values()
        for key in part
    }
    return {name for name in data.planned if key_of(name) in keys}


def test_a_vanished_input_keeps_its_sample_where_another_of_its_shard_changes(
    data: IncrementalDataSet,
) -> None:
    data.put("photo-a.jpg", ANN)
    data.put("photo-b.jpg", BOB)
    data.run()
    data.remove("photo-a.jpg")
    data.put("photo-b.jpg", CAT)
    data.run()
    assert data.row("photo-a.jpg")["status"] == "ok"


def test_a_vanished_input_keeps_its_sample_where_its_copy_is_a_copy_no_more(
    data: IncrementalDataSet,
) -> None:
    data.put("photo-a.jpg", ANN)
    data.put("photo-b.jpg", ANN)
    data.run()
    assert data.row("photo-b.jpg")["stage"] == "source", "planning found the copy"
    data.remove("photo-a.jpg")
    data.run()
    assert data.row("photo-a.jpg")["status"] == "ok"
    assert (data.row("photo-b.jpg")["reason"], bool(data.row("photo-b.jpg")["sha256"])) == (
        "duplicate",
        True,
    )


def test_a_vanished_row_of_a_table_does_not_get_the_bytes_of_another_row(
    tmp_path: Path,
) -> None:
    table = tmp_path / "table.parquet"
    (tmp_path / OUTAGE).write_text("[]")
    output = tmp_path / "output"
    settings = incremental.Settings().config(tmp_path)
    source = replace(settings.source, path=str(table), name_column="id", kind="parquet")
    settings = replace(settings, source=source)

    def write(**scenes: bytes) -> dict[str, Row]:
        rows = [{"id": name, "image": data} for name, data in scenes.items()]
        pq.write_table(pa.Table.from_pylist(rows), table)
        incremental.run(settings, frozenset())
        return {row["source"]: row for row in rows_of(output)}

    before = write(ann=ANN, bob=BOB, cat=CAT)
    after = write(ann=ANN, cat=CAT)
    assert after["bob"] == before["bob"]


def test_a_copy_of_what_was_taken_down_does_not_name_it(data: IncrementalDataSet) -> None:
    data.put("photo-a.jpg", ANN)
    data.run()
    data.take_down("source", "photo-a.jpg")
    data.put("photo-b.jpg", ANN)
    data.run()
    assert data.row("photo-b.jpg")["reason"] == "taken_down"


def test_a_copy_of_new_bytes_of_a_removed_input_is_processed(
    data: IncrementalDataSet,
) -> None:
    """An input that was taken down is never processed again, also if its bytes have changed."""
    data.put("photo-a.jpg", ANN)
    data.run()
    data.take_down("source", "photo-a.jpg")
    data.put("photo-a.jpg", BOB)
    data.put("photo-b.jpg", BOB)
    data.run()
    assert (data.row("photo-a.jpg")["reason"], data.row("photo-b.jpg")["status"]) == (
        "taken_down",
        "ok",
    )


def test_copies_of_copies_go_with_their_original(data: IncrementalDataSet) -> None:
    data.put("photo-a.jpg", ANN)
    data.put("photo-b.jpg", ANN_AGAIN)
    data.put("photo-c.jpg", ANN_AGAIN)
    data.put("photo-d.jpg", BOB)
    data.run()
    assert [data.row(name)["reason"] for name in ("photo-b.jpg", "photo-c.jpg")] == [
        "near_duplicate",
        "duplicate",
    ]
    data.take_down("source", "photo-a.jpg")
    assert taken_down(data) == {"photo-a.jpg", "photo-b.jpg", "photo-c.jpg"}


def test_the_same_bytes_go_too_where_nothing_was_compared(data: IncrementalDataSet) -> None:
    """A vanished input isn't compared by planning, nor a quarantined one by the global pass."""
    data.change(min_sharpness=0.3)
    data.put("photo-a.jpg", BLURRED)
    data.put("photo-z.jpg", BOB)
    data.run()
    data.remove("photo-a.jpg")
    data.put("photo-b.jpg", BLURRED)
    data.run()
    assert {data.row(name)["reason"] for name in ("photo-a.jpg", "photo-b.jpg")} == {"blurred"}
    data.take_down("source", "photo-a.jpg")
    assert taken_down(data) == {"photo-a.jpg", "photo-b.jpg"}
    data.run()


def test_a_take_down_leaves_nothing_of_what_a_killed_run_wrote(data: IncrementalDataSet) -> None:
    for name, scene in (
        ("photo-a.jpg", ANN),
        ("photo-b.jpg", BOB),
        ("photo-c.jpg", CAT),
        ("photo-d.jpg", ANN),
    ):
        data.put(name, scene)
    data.run()
    for kind in ("json", "parquet"):
        (data.output / "shards" / f"fgid-000001.{kind}").unlink()
    (data.output / ".duplicates.parquet.tmp-12345678").write_bytes(b"photo-a.jpg")
    data.take_down("source", "photo-a.jpg")
    data.run()


def test_a_take_down_that_is_killed_at_any_moment_loses_nobody_else(
    data: IncrementalDataSet, tmp_path: Path
) -> None:
    data.change(min_sharpness=0.3)
    for name, scene in (("a", ANN), ("b", BOB), ("c", BLURRED), ("d", CAT), ("e", ANN)):
        data.put(f"photo-{name}.jpg", scene)
    data.run()
    for name in tuple(data.files):
        data.remove(name)
    (data.source / "notes.txt").write_text("all photographs are gone")
    complete, moment = shutil.copytree(data.output, tmp_path / "copy"), 0
    killed = True
    while killed:
        # every moment until the removal is recorded, then every third
        moment += 1 if moment < 12 else 3
        shutil.rmtree(data.output)
        shutil.copytree(complete, data.output)
        killed = sigkill.killed(
            moment, tmp_path / "errors", incremental.remove, data.output, "source", "photo-a.jpg"
        )
        if moment % 2:
            incremental.run(data.config)
        else:
            incremental.remove(data.output, "source", "photo-a.jpg")
        rows = {row["source"]: row for row in rows_of(data.output)}
        assert rows["photo-b.jpg"]["status"] == rows["photo-d.jpg"]["status"] == "ok", moment
        assert is_quarantined(rows["photo-c.jpg"]), moment
        assert not data.store.names(layout.STAGED)
        removed = not {"photo-a.jpg", "photo-e.jpg"} & {*rows}
        assert removed or (moment < 10 and moment % 2 and not read_takedowns(data.store))
        assert len(read_takedowns(data.store)) == removed
        assert list(lint(data.store)) == []
    assert moment > 40


def test_a_full_disk_during_a_take_down_leaves_each_shard_as_it_was(
    data: IncrementalDataSet,
) -> None:
    for name, scene in (("a", ANN), ("b", BOB), ("c", CAT)):
        data.put(f"photo-{name}.jpg", scene)
    data.run()
    for name in tuple(data.files):
        data.remove(name)
    before = rows_of(data.output)
    script = (
        "import resource, sys; from pathlib import Path; from tests.pipelines import incremental; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "incremental.remove(Path(sys.argv[1]), 'source', 'photo-a.jpg')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(data.output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StoreError" in result.stderr and "File too large" in result.stderr, result.stderr
    assert rows_of(data.output) == before
    assert not any(".tmp-" in path.name for path in data.output.rglob("*"))
    data.run()
    assert taken_down(data) == {"photo-a.jpg"}


def test_the_kept_settings_are_those_of_the_output_after_a_killed_run_with_others(
    data: IncrementalDataSet,
) -> None:
    data.put("photo-a.jpg", ANN)
    data.run()
    others = replace(data.settings, prompt="B").config(data.folder)
    data.store.write("config.yaml", to_yaml(others))  # and then it was killed
    data.run()


def test_a_run_that_is_killed_again_and_again(data: IncrementalDataSet) -> None:
    for name, scene in (("a", ANN), ("b", ANN_AGAIN), ("c", BLURRED), ("d", BOB), ("e", ANN)):
        data.put(f"photo-{name}.jpg", scene)
    for changes in ({"min_sharpness": 0.3}, {"min_sharpness": 0.0, "prompt": "B"}):
        data.change(**changes)
        moment = 3
        while not data.run(kill_at=moment):
            moment += 3
        assert moment > 20
        data.put("photo-f.jpg", CAT)


def test_a_run_removes_temporary_files_of_workers_that_were_killed(
    data: IncrementalDataSet,
) -> None:
    data.put("photo-a.jpg", ANN)
    (data.folder / OUTAGE).write_text("[]")
    left = data.output / "shards" / ".fgid-000000.json.tmp-12345678"
    for _ in execute(plan_job(data.config, chain=stub_chain), lambda count: None):
        left.write_bytes(b"{")
    assert not left.exists()
