"""Listing and planning: unusual names, irregular files, keys, exact copies, the order of shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from configs.errors import SourceError
from pipelines.planning.plan import Plan, make_plan, planned_inputs, write_plan
from pipelines.sources import Input, build_source
from stages.record import key_of
from stages.storage.store import Store
from tests.pipelines.helpers import config


def test_unusual_names_are_listed_and_other_files_are_not(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "with space.JPG",
        "dots.in.name.png",
        "ünï/çodé.webp",
        "deep/er/x.jpeg",
        "new\nline.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    raw = os.fsencode(tmp_path) + b"/bad\xff.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"y")
    source = build_source(config(tmp_path, tmp_path / "out"))
    items = {item.source: item for item in source.list()}
    assert set(items) == {*names, "bad\\xff.jpg"}
    assert source.record(items["bad\\xff.jpg"]).image == b"y"


def test_the_folder_above_a_file_names_the_person_if_that_is_set(tmp_path: Path) -> None:
    names = ["ada/1.jpg", "more/Bea B./2.jpg", "ünï/3.jpg", "4.jpg"]
    files = fsspec.filesystem("memory")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        files.pipe(f"/people/{name}", b"x")
    stated = {"ada/1.jpg": "ada", "more/Bea B./2.jpg": "Bea B.", "ünï/3.jpg": "ünï", "4.jpg": ""}

    def people(path: Path | str, *overrides: str) -> dict[str, str]:
        source = build_source(config(path, "", *overrides))
        return {item.source: source.record(item).person for item in source.list()}

    setting = "source.person_folder=true"
    assert people(tmp_path, setting) == people("memory://people", setting) == stated
    assert people(tmp_path / "*/*.jpg", setting) == {n: stated[n] for n in (names[0], names[2])}
    assert people(tmp_path) == dict.fromkeys(names, "")
    with pytest.raises(SourceError, match=r"person_folder=true, but .* is of kind webdataset"):
        people(tmp_path / "a.tar", setting)


def test_irregular_files_are_listed_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "regular.jpg").write_bytes(b"x")
    source = build_source(config(tmp_path, tmp_path / "out"))
    reasons = {item.source: source.record(item).reason for item in source.list()}
    irregular = dict.fromkeys(("folder.jpg", "dangling.jpg", "pipe.jpg"), "not_a_file")
    assert reasons == {**irregular, "regular.jpg": ""}


def test_a_file_that_is_too_large_or_deleted_fails_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 100)
    source = build_source(config(tmp_path, tmp_path / "out", "resize.max_bytes=50"))
    (item,) = source.list()
    assert source.record(item).reason == "too_many_bytes"
    (tmp_path / "a.jpg").unlink()
    assert source.record(item).reason == "not_a_file"


def test_the_output_inside_the_source_is_not_an_input(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.jpg").write_bytes(b"x")
    plan = make_plan(config(tmp_path, tmp_path / "out"), Store(str(tmp_path / "out")))
    assert [item.source for item in plan.inputs_of(0)] == ["a.jpg"]


def test_a_moved_folder_keeps_its_keys(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(b"x")
    before = [item.key for item in build_source(config(tmp_path / "one", tmp_path / "out")).list()]
    (tmp_path / "one").rename(tmp_path / "two")
    after = [item.key for item in build_source(config(tmp_path / "two", tmp_path / "out")).list()]
    assert after == before == [key_of("a.jpg")]


def test_exact_copies_are_found_and_empty_files_are_not_copies(tmp_path: Path) -> None:
    contents = {
        "a.jpg": b"A" * 9000,
        "b.jpg": b"A" * 9000,
        "c.jpg": b"A" * 8999 + b"B",
        "d.jpg": b"",
        "e.jpg": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    plan = make_plan(config(tmp_path, tmp_path / "out"), Store(str(tmp_path / "out")))
    copies = {i.source: i.duplicate_of for items in shards(plan) for i in items if i.duplicate_of}
    assert copies == {"b.jpg": "a.jpg"}


def test_planned_inputs_keep_their_shard_and_new_ones_get_new_shards(tmp_path: Path) -> None:
    for name in ("b.jpg", "c.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    settings = config(tmp_path, tmp_path / "out", "shard_size=2")
    store = Store(str(tmp_path / "out"))
    write_plan(make_plan(settings, store), store)
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "c.jpg").unlink()
    plan = make_plan(settings, store)
    assert [[i.source for i in items] for items in shards(plan)] == [
        ["b.jpg", "c.jpg"],
        ["d.jpg"],
        ["a.jpg"],
    ]
    assert (plan.new, plan.changed, plan.vanished) == (1, 0, 1)
    assert planned_inputs(store) == [2, 1]


_NO_ROOM = """
import resource, sys
from pipelines.planning.plan import make_plan
from stages.storage.store import Store
from tests.pipelines.helpers import config
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    make_plan(config(sys.argv[1], sys.argv[2]), Store(sys.argv[2]))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


# few rows: the disk is full when the plan is written; many: while SQLite sorts them
@pytest.mark.parametrize("rows", [3, 50_000])
def test_a_full_disk_while_planning_raises_a_clear_error(tmp_path: Path, rows: int) -> None:
    urls, scratch = tmp_path / "urls.txt", tmp_path / "scratch"
    urls.write_text("".join(f"https://example.org/{row}.jpg\n" for row in range(rows)))
    scratch.mkdir()
    command = [sys.executable, "-c", _NO_ROOM, str(urls), str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("StoreError: there is no room for the plan on local disk: "), done
    assert not list(scratch.iterdir())


def shards(plan: Plan) -> list[list[Input]]:
    return [plan.inputs_of(shard.index) for shard in plan.shards]


def test_a_store_writes_atomically_and_rejects_paths_outside_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(RuntimeError), store.writer("shards/a.tar") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert store.names("shards") == [] and not list((tmp_path / "shards").iterdir())
    store.write("shards/a.tar", b"whole")
    assert store.read("shards/a.tar") == b"whole" and store.read("shards/a.tar", 1, 3) == b"ho"
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(ValueError, match="leave the store"):
            store.write(name, b"")
