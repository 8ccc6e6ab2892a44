"""Parquet tables as a source: images in cells, images in files beside the table, and a full run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import SourceError
from pipelines.run import run
from pipelines.sources import Input, build_source
from pipelines.sources.tables import ParquetTable
from stages.base import Failed
from tests.pipelines.helpers import config


def source(path: object, folder: Path, *overrides: str) -> ParquetTable:
    settings = config(Path("unused"), folder / "out", f"source.path={path}", *overrides)
    tables = build_source(settings)
    assert isinstance(tables, ParquetTable)
    return tables


def write(path: Path, rows: list[dict[str, Any]], group: int = 2) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


@pytest.mark.parametrize("kind", ["bytes", "struct", "large"])
def test_images_in_cells_keep_row_order_provenance_and_reasons(tmp_path: Path, kind: str) -> None:
    cells = [b"0", b"1", None, b"x" * 200, b"4"]
    rows = [
        {
            "image": {"bytes": cell, "path": "p"} if kind == "struct" else cell,
            "license": f"L{i}",
            "author": None,
            "person": float(i // 2) if i else None,  # as pandas writes whole numbers and a gap
        }
        for i, cell in enumerate(cells)
    ]
    table = pa.Table.from_pylist(rows)
    if kind == "large":
        table = table.set_column(0, "image", table["image"].cast(pa.large_binary()))
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    tables = source(tmp_path / "t.parquet", tmp_path, "resize.max_bytes=100")
    items = list(tables.list())
    assert [item.source for item in items] == [f"t.parquet#00000000{i}" for i in range(5)]
    for order in (items, items[::-1], items[1:4]):
        records = list(tables.records(order))
        assert [record.source for record in records] == [item.source for item in order]
        assert [r.image for r in records] == [tables.record(item).image for item in order]
    records = list(tables.records(items))
    assert [r.reason for r in records] == ["", "", "no_image", "too_many_bytes", ""]
    stated = [(r.image, r.license, r.person) for r in records if r.ok]
    assert stated == [(b"0", "L0", ""), (b"1", "L1", "0"), (b"4", "L4", "2")]


def test_each_row_group_is_read_once(tmp_path: Path) -> None:
    """Counts the bytes that this process reads: row by row it would be five times the file."""
    images = [random.Random(i).randbytes(300_000) for i in range(10)]
    rows = [{"image": data, "id": f"n{i * 7 % 10}"} for i, data in enumerate(images)]
    write(tmp_path / "t.parquet", rows, group=5)
    tables = source(tmp_path / "t.parquet", tmp_path, "source.name_column=id")
    items = sorted(tables.list(), key=lambda item: item.source)
    process = psutil.Process()
    before = process.io_counters().read_chars
    assert [r.image for r in tables.records(items)] == [images[i * 3 % 10] for i in range(10)]
    read = process.io_counters().read_chars - before
    assert 3_000_000 <= read < 4_500_000
    before = process.io_counters().read_chars
    heads = [*tables.heads(items, 100)]
    assert heads == [images[i * 3 % 10][:100] for i in range(10)]
    assert process.io_counters().read_chars - before < 4_500_000


def test_heads_say_why_a_row_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [{"image": b"0"}, {"image": None}])
    tables = source(tmp_path / "t.parquet", tmp_path)
    image, missing = tables.heads([*tables.list()], 100)
    assert image == b"0" and isinstance(missing, Failed) and missing.reason == "no_image"


def test_a_vanished_row_without_a_locator_is_not_a_file(tmp_path: Path) -> None:
    """A plan that is made again from the sidecars has no locators."""
    write(tmp_path / "t.parquet", [{"image": b"0"}])
    tables = source(tmp_path / "t.parquet", tmp_path)
    items = [*tables.list(), Input(source="gone", locator=b"", vanished=True)]
    assert [record.reason for record in tables.records(items)] == ["", "not_a_file"]
    assert [record.reason for record in tables.records(items[1:])] == ["not_a_file"]


def test_two_names_of_one_row_both_get_its_image(tmp_path: Path) -> None:
    """As after a change of source.name_column: the input of the old name has vanished from the
    listing and keeps its place in the plan, while its row still exists.
    """
    write(tmp_path / "t.parquet", [{"image": b"0", "id": "n"}])
    before = list(source(tmp_path / "t.parquet", tmp_path).list())
    tables = source(tmp_path / "t.parquet", tmp_path, "source.name_column=id")
    assert [record.image for record in tables.records([*before, *tables.list()])] == [b"0", b"0"]


def test_images_beside_the_table_cannot_leave_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"image")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.jpg").symlink_to(folder / "sub" / "a.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    expected = {
        "sub/a.jpg": "",
        "gone.jpg": "not_a_file",
        "sub": "not_a_file",
        "../secret.jpg": "outside_source",
        "sub/../../secret.jpg": "outside_source",
        "sub\\..\\..\\secret.jpg": "outside_source",
        str(tmp_path / "secret.jpg"): "outside_source",
        "C:\\secret.jpg": "outside_source",
        "file:///etc/passwd": "outside_source",
        "nul\0.jpg": "outside_source",
        "link.jpg": "outside_source",
        "up/secret.jpg": "outside_source",
        "inside.jpg": "",
        "loop.jpg": "not_a_file",
        None: "no_image",
    }
    write(folder / "t.parquet", [{"path": path} for path in expected])
    tables = source(folder / "t.parquet", tmp_path)
    records = list(tables.records(list(tables.list())))
    assert [record.reason for record in records] == list(expected.values())
    assert records[0].image == b"image"


def test_several_tables_local_and_behind_a_url(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", [{"image": name.encode()}])
    expected = [("a.parquet#000000000", b"a"), ("b.parquet#000000000", b"b")]
    memory = fsspec.filesystem("memory")
    for file in sorted(tmp_path.glob("*.parquet")):
        memory.pipe(f"/tables/{file.name}", file.read_bytes())
    for path in (
        tmp_path,
        tmp_path / "*.parquet",
        tmp_path / "{a,b}.parquet",
        "memory://tables/*.parquet",
    ):
        tables = source(path, tmp_path, "source.kind=parquet")
        records = tables.records(list(tables.list()))
        assert [(r.source, r.image) for r in records] == expected, path
    memory.rm("/tables", recursive=True)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"url": "http://a.example"}, [], "source.kind=urls"),
        ({"image": "a.jpg"}, [], "holds string"),
        ({"photo": b"x"}, [], "no column 'image' or 'path'. It has photo"),
        ({"image": b"x"}, ["source.name_column=id"], "name_column='id'"),
    ],
)
def test_an_unusable_table_raises_an_error_that_says_what_to_do(
    tmp_path: Path, row: dict[str, Any], settings: list[str], message: str
) -> None:
    write(tmp_path / "t.parquet", [row])
    with pytest.raises(SourceError, match=message):
        list(source(tmp_path / "t.parquet", tmp_path, *settings).list())


def test_a_truncated_or_deleted_table_raises_or_fails_its_rows(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [{"image": b"x" * 5000}])
    tables = source(tmp_path / "t.parquet", tmp_path, "source.backoff=0")
    items = list(tables.list())
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="no whole parquet"):
        list(tables.list())
    assert [r.reason for r in tables.records(items)] == ["unreadable"]
    (tmp_path / "t.parquet").unlink()
    assert [r.reason for r in tables.records(items)] == ["not_a_file"]


def test_the_ledger_of_a_table_balances(portraits: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted(portraits.glob("*.jpg"))[:2]]
    write(tmp_path / "t.parquet", [{"image": data} for data in (*files, None, b"<html>")])
    ledger = run(config(tmp_path / "t.parquet", tmp_path / "out"))
    assert (ledger.inputs, ledger.written) == (4, 2)
    assert dict(ledger.failed) == {"no_image": 1, "not_an_image": 1}
