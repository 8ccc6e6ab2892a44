"""Parquet tables as a source: pictures in cells and pictures beside the table, row groups read
once, and a run.
"""

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
from pipelines.sources import build_source
from pipelines.sources.tables import ParquetTable
from tests.pipelines.helpers import config


def source(path: object, folder: Path, *overrides: str) -> ParquetTable:
    made = build_source(config(Path("unused"), folder / "out", f"source.path={path}", *overrides))
    assert isinstance(made, ParquetTable)
    return made


def write(path: Path, rows: list[dict[str, Any]], group: int = 2) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


@pytest.mark.parametrize("kind", ["bytes", "struct", "large"])
def test_pictures_in_cells_keep_row_order_facts_and_reasons(tmp_path: Path, kind: str) -> None:
    cells = [b"0", b"1", None, b"x" * 200, b"4"]
    rows = [
        {
            "image": {"bytes": cell, "path": "p"} if kind == "struct" else cell,
            "license": f"L{i}",
            "author": None,
        }
        for i, cell in enumerate(cells)
    ]
    table = pa.Table.from_pylist(rows)
    if kind == "large":
        table = table.set_column(0, "image", table["image"].cast(pa.large_binary()))
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    made = source(tmp_path / "t.parquet", tmp_path, "resize.max_bytes=100")
    items = list(made.list())
    assert [item.source for item in items] == [f"t.parquet#00000000{i}" for i in range(5)]
    for order in (items, items[::-1], items[1:4]):
        records = list(made.records(order))
        assert [record.source for record in records] == [item.source for item in order]
        assert [r.image for r in records] == [made.record(item).image for item in order]
    found = list(made.records(items))
    assert [r.reason for r in found] == ["", "", "no_image", "too_many_bytes", ""]
    assert [(r.image, r.license) for r in found if r.ok] == [
        (b"0", "L0"),
        (b"1", "L1"),
        (b"4", "L4"),
    ]


def test_each_row_group_is_read_once(tmp_path: Path) -> None:
    """By what this process reads: row by row it would be five times the file."""
    pictures = [random.Random(i).randbytes(300_000) for i in range(10)]
    write(
        tmp_path / "t.parquet",
        [{"image": data, "id": f"n{i * 7 % 10}"} for i, data in enumerate(pictures)],
        group=5,
    )
    made = source(tmp_path / "t.parquet", tmp_path, "source.name_column=id")
    items = sorted(made.list(), key=lambda item: item.source)
    process = psutil.Process()
    before = process.io_counters().read_chars
    assert [r.image for r in made.records(items)] == [pictures[i * 3 % 10] for i in range(10)]
    read = process.io_counters().read_chars - before
    assert 3_000_000 <= read < 4_500_000


def test_two_names_for_one_row_both_have_its_picture(tmp_path: Path) -> None:
    """As after a change of source.name_column: what has vanished keeps its place, and its row is
    still there.
    """
    write(tmp_path / "t.parquet", [{"image": b"0", "id": "n"}])
    before = list(source(tmp_path / "t.parquet", tmp_path).list())
    made = source(tmp_path / "t.parquet", tmp_path, "source.name_column=id")
    assert [record.image for record in made.records([*before, *made.list()])] == [b"0", b"0"]


def test_pictures_beside_the_table_cannot_leave_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"picture")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
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
        None: "no_image",
    }
    write(folder / "t.parquet", [{"path": path} for path in expected])
    made = source(folder / "t.parquet", tmp_path)
    records = list(made.records(list(made.list())))
    assert [record.reason for record in records] == list(expected.values())
    assert records[0].image == b"picture"


def test_several_tables_here_and_behind_a_url(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", [{"image": name.encode()}])
    expected = [("a.parquet#000000000", b"a"), ("b.parquet#000000000", b"b")]
    memory = fsspec.filesystem("memory")
    for path in sorted(tmp_path.glob("*.parquet")):
        memory.pipe(f"/tables/{path.name}", path.read_bytes())
    for given in (
        tmp_path,
        tmp_path / "*.parquet",
        tmp_path / "{a,b}.parquet",
        "memory://tables/*.parquet",
    ):
        made = source(given, tmp_path, "source.kind=parquet")
        assert [(r.source, r.image) for r in made.records(list(made.list()))] == expected, given
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
def test_a_table_that_cannot_be_used_says_what_to_do(
    tmp_path: Path, row: dict[str, Any], settings: list[str], message: str
) -> None:
    write(tmp_path / "t.parquet", [row])
    with pytest.raises(SourceError, match=message):
        list(source(tmp_path / "t.parquet", tmp_path, *settings).list())


def test_a_table_that_is_cut_off_or_gone_says_so(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [{"image": b"x" * 5000}])
    made = source(tmp_path / "t.parquet", tmp_path, "source.backoff=0")
    items = list(made.list())
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="no whole parquet"):
        list(made.list())
    assert [r.reason for r in made.records(items)] == ["unreadable"]
    (tmp_path / "t.parquet").unlink()
    assert [r.reason for r in made.records(items)] == ["not_a_file"]


def test_the_ledger_of_a_table_balances(portraits: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted(portraits.glob("*.jpg"))[:2]]
    write(tmp_path / "t.parquet", [{"image": data} for data in (*files, None, b"<html>")])
    ledger = run(config(tmp_path / "t.parquet", tmp_path / "out"))
    assert (ledger.inputs, ledger.written) == (4, 2)
    assert dict(ledger.failed) == {"no_image": 1, "not_an_image": 1}
