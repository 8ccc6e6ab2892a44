"""WebDataset tars as a source: which members become inputs, what is wrong with the others, and a
run that balances.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest

from configs.errors import SourceError
from pipelines.run import run
from pipelines.sources import Input, build_source
from pipelines.sources.tars import WebDataset
from tests.pipelines.helpers import config
from tests.pipelines.sources.server import plain, serving

GOOD = b'{"license": "CC0", "author": "Ada", "caption": "ignored"}'


def write_tar(path: Path, members: dict[str, bytes | str]) -> None:
    """Members of bytes are files, those of text links to it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def source(path: object, folder: Path, *overrides: str) -> WebDataset:
    made = build_source(config(Path("unused"), folder / "out", f"source.path={path}", *overrides))
    assert isinstance(made, WebDataset)
    return made


def listed(path: object, folder: Path, *overrides: str) -> dict[str, Input]:
    return {item.source: item for item in source(path, folder, *overrides).list()}


def test_one_input_for_each_sample_with_a_picture(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "./one.parsing.png": b"no",
            "./one.jpg": b"first",
            "./one.json": GOOD,
            "two.JPG": b"second",
            "two.json": b"{broken",
            "text.txt": b"no picture",
            "photo.001.png": b"third",
            "photo.002.png": b"fourth",
            "._mac.jpg": b"no",
            "three.jpg": b"",
            "three.json": b"[" * 200_000,
        },
    )
    made = source(tmp_path / "a.tar", tmp_path)
    records = [made.record(item) for item in made.list()]
    assert {record.source: record.image for record in records if record.ok} == {
        "a.tar/one.jpg": b"first",
        "a.tar/two.JPG": b"second",
        "a.tar/photo.001.png": b"third",
        "a.tar/photo.002.png": b"fourth",
        "a.tar/three.jpg": b"",
    }
    assert [(r.license, r.author) for r in records] == [("CC0", "Ada"), *[("", "")] * 4]


def test_facts_are_short_text_and_nothing_else(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"}
    members |= {"a.json": json.dumps({"license": 7, "author": "x" * 5000}).encode()}
    members |= {
        "b.json": b'{"license": "\\ud800"}',
        "c.json": b'{"license": "CC0", "x": "' + bytes(300_000) + b'"}',
    }
    write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    facts = [
        json.loads(item.facts or "{}") for item in listed(tmp_path / "a.tar", tmp_path).values()
    ]
    assert facts == [{"author": "x" * 1000}, {"license": "?"}, {}]


def test_what_is_no_plain_member_is_listed_with_its_reason_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(
        folder / "a.tar",
        {
            "link.jpg": "/etc/passwd",
            "../up.jpg": b"x",
            "/abs.jpg": b"x",
            "d/../../e.jpg": b"x",
            "caf\udce9.jpg": b"x",
        },
    )
    before = sorted(tmp_path.rglob("*"))
    made = source(folder / "a.tar", tmp_path)
    assert {item.source: made.record(item).reason for item in made.list()} == {
        "a.tar/link.jpg": "not_a_file",
        "a.tar/../up.jpg": "outside_source",
        "a.tar//abs.jpg": "outside_source",
        "a.tar/d/../../e.jpg": "outside_source",
        "a.tar/caf\\xe9.jpg": "",
    }
    assert sorted(tmp_path.rglob("*")) == before


def damaged(whole: bytes) -> Iterator[tuple[str, bytes, str]]:
    """name, bytes, the reason of its loss; `whole` holds a.jpg (600 bytes) and b.jpg (600 bytes)."""
    yield "in a picture", whole[: 1536 + 512 + 300], "truncated_tar"
    yield "in a header", whole[: 1536 + 100], "truncated_tar"
    yield "between two", whole[:1536], "truncated_tar"
    yield "no end mark", whole[:3072], "truncated_tar"
    yield "garbage", whole[:1536] + b"\xff" * 5000, "damaged_tar"
    yield "below zero", whole[:1536] + negative("b.jpg") + bytes(2048), "damaged_tar"
    yield "huge header", whole[:1536] + header("L", 1 << 33) + bytes(4096), "damaged_tar"


def header(kind: str, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind.encode(), size
    return info.tobuf(tarfile.GNU_FORMAT)


def negative(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = -1024
    return info.tobuf(tarfile.GNU_FORMAT)


def test_of_a_broken_tar_what_is_whole_is_listed_and_the_loss_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", {"a.jpg": b"A" * 600, "b.jpg": b"B" * 600})
    whole = (tmp_path / "whole.tar").read_bytes()
    for name, data, reason in damaged(whole):
        (tmp_path / "cut.tar").write_bytes(data)
        made = source(tmp_path / "cut.tar", tmp_path)
        records = [made.record(item) for item in made.list()]
        assert (records[0].source, records[0].image) == ("cut.tar/a.jpg", b"A" * 600), name
        assert (records[-1].source, records[-1].reason) == ("cut.tar", reason), name
        assert len(records) == (3 if name == "no end mark" else 2), name


def test_what_is_no_tar_at_all_is_said(tmp_path: Path) -> None:
    for data, reason in ((b"", "truncated_tar"), (b"PK" * 5000, "damaged_tar")):
        (tmp_path / "a.tar").write_bytes(data)
        made = source(tmp_path / "a.tar", tmp_path)
        assert [made.record(item).reason for item in made.list()] == [reason]


def test_a_path_may_be_a_glob_a_brace_pattern_a_folder_or_a_url(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for number in range(3):
        write_tar(tmp_path / "sub" / f"x-{number:03}.tar", {"a.jpg": b"%d" % number})
    write_tar(tmp_path / "y.tar", {"a.jpg": b"y"})
    (tmp_path / "notes.txt").write_text("no tar")
    cases = {
        f"{tmp_path}/sub/x-{{000..001}}.tar": ["x-000.tar/a.jpg", "x-001.tar/a.jpg"],
        f"{tmp_path}/sub/*.tar": ["x-000.tar/a.jpg", "x-001.tar/a.jpg", "x-002.tar/a.jpg"],
        f"{tmp_path}/*/x-00[01].tar": ["sub/x-000.tar/a.jpg", "sub/x-001.tar/a.jpg"],
        str(tmp_path): [*[f"sub/x-00{n}.tar/a.jpg" for n in range(3)], "y.tar/a.jpg"],
        f"file://{tmp_path}/y.tar": ["y.tar/a.jpg"],
    }
    for path, expected in cases.items():
        assert list(listed(path, tmp_path, "source.kind=webdataset")) == expected, path
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/y.tar", (tmp_path / "y.tar").read_bytes())
    made = source("memory://bucket/y.tar", tmp_path)
    assert [(item.source, made.record(item).image) for item in made.list()] == [
        ("y.tar/a.jpg", b"y")
    ]
    memory.rm("/bucket", recursive=True)
    for wrong in ("sub/x-{000..009}.tar", "none/*.tar", "sub/x-{000.tar", "gone.tar"):
        with pytest.raises(SourceError):
            listed(tmp_path / wrong, tmp_path)


def test_the_shards_of_an_output_inside_the_folder_are_no_input(tmp_path: Path) -> None:
    (tmp_path / "out" / "shards").mkdir(parents=True)
    write_tar(tmp_path / "out" / "shards" / "fgid-000000.tar", {"a.jpg": b"x"})
    write_tar(tmp_path / "y.tar", {"a.jpg": b"y"})
    assert list(listed(tmp_path, tmp_path, "source.kind=webdataset")) == ["y.tar/a.jpg"]


def test_a_tar_that_changed_or_went_away_since_it_was_listed_has_a_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 100})
    made = source(tmp_path / "a.tar", tmp_path, "resize.max_bytes=100")
    (item,) = made.list()
    assert made.read(item, 3) == b"xxx"
    assert (
        source(tmp_path / "a.tar", tmp_path, "resize.max_bytes=99").record(item).reason
        == "too_many_bytes"
    )
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:550])
    assert made.record(item).reason == "unreadable"
    (tmp_path / "a.tar").unlink()
    assert made.record(item).reason == "not_a_file"


def test_a_server_that_sends_tars_whole_only_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 100})
    whole = (tmp_path / "a.tar").read_bytes()

    def without_length(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(whole)

    with serving() as server:
        server.answers = {"/a.tar": plain(whole), "/b.tar": without_length}
        made = source(f"{server.url}/a.tar", tmp_path)
        assert [made.record(item).reason for item in made.list()] == ["unreadable"]
        with pytest.raises(SourceError, match="Copy it here first"):
            list(source(f"{server.url}/b.tar", tmp_path).list())


def test_the_ledger_of_tars_balances(portraits: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted(portraits.glob("*.jpg"))[:2]]
    write_tar(
        tmp_path / "x.tar",
        {"a.jpg": files[0], "b.jpg": files[1], "c.jpg": files[0], "d.jpg": "/etc/passwd"},
    )
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(
        whole.rstrip(b"\0") + bytes(512 - len(whole.rstrip(b"\0")) % 512)
    )
    ledger = run(config(tmp_path / "x.tar", tmp_path / "out"))
    assert (ledger.inputs, ledger.written, dict(ledger.dropped)) == (5, 2, {"duplicate": 1})
    assert dict(ledger.failed) == {"not_a_file": 1, "truncated_tar": 1}
