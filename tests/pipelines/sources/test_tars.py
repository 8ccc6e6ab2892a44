"""WebDataset tars as a source: which members become inputs, why others fail, and a full run."""

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
    """Writes members with bytes as files, members with text as links to that path."""
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
    settings = config(Path("unused"), folder / "out", f"source.path={path}", *overrides)
    tars = build_source(settings)
    assert isinstance(tars, WebDataset)
    return tars


def listed(path: object, folder: Path, *overrides: str) -> dict[str, Input]:
    return {item.source: item for item in source(path, folder, *overrides).list()}


def test_one_input_for_each_sample_with_an_image(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "./one.parsing.png": b"no",
            "./one.jpg": b"first",
            "./one.json": GOOD,
            "two.JPG": b"second",
            "two.json": b"{broken",
            "text.txt": b"no image",
            "photo.001.png": b"third",
            "photo.002.png": b"fourth",
            "._mac.jpg": b"no",
            "three.jpg": b"",
            "three.json": b"[" * 200_000,
        },
    )
    tars = source(tmp_path / "a.tar", tmp_path)
    records = [tars.record(item) for item in tars.list()]
    assert {record.source: record.image for record in records if record.ok} == {
        "a.tar/one.jpg": b"first",
        "a.tar/two.JPG": b"second",
        "a.tar/photo.001.png": b"third",
        "a.tar/photo.002.png": b"fourth",
        "a.tar/three.jpg": b"",
    }
    assert [(r.license, r.author) for r in records] == [("CC0", "Ada"), *[("", "")] * 4]


def test_provenance_is_short_text_or_the_number_of_a_person(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {f"{name}.jpg": name.encode() for name in "abcdefg"}
    members |= {"a.json": json.dumps({"license": 7, "author": "x" * 5000}).encode()}
    members |= {
        "b.json": b'{"license": "\\ud800"}',
        "c.json": b'{"license": "CC0", "x": "' + bytes(300_000) + b'"}',
        "d.json": b'{"person": " Ada "}',
        "e.json": b'{"person": 7}',
        "f.json": b'{"person": true}',
        "g.json": b'{"person": NaN}',
    }
    write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    items = listed(tmp_path / "a.tar", tmp_path).values()
    provenance = [json.loads(item.provenance or "{}") for item in items]
    people = [{"person": "Ada"}, {"person": "7"}, {}, {}]
    assert provenance == [{"author": "x" * 1000}, {"license": "?"}, {}, *people]


def test_irregular_members_fail_with_a_reason_and_nothing_is_written(tmp_path: Path) -> None:
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
    tars = source(folder / "a.tar", tmp_path)
    assert {item.source: tars.record(item).reason for item in tars.list()} == {
        "a.tar/link.jpg": "not_a_file",
        "a.tar/../up.jpg": "outside_source",
        "a.tar//abs.jpg": "outside_source",
        "a.tar/d/../../e.jpg": "outside_source",
        "a.tar/caf\\xe9.jpg": "",
    }
    assert sorted(tmp_path.rglob("*")) == before


def damaged(whole: bytes) -> Iterator[tuple[str, bytes, str]]:
    """(what is damaged, bytes, reason). `whole` holds a.jpg and b.jpg, 600 bytes each."""
    yield "in an image", whole[: 1536 + 512 + 300], "truncated_tar"
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


def test_a_broken_tar_yields_its_complete_samples_and_a_failure(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", {"a.jpg": b"A" * 600, "b.jpg": b"B" * 600})
    whole = (tmp_path / "whole.tar").read_bytes()
    for name, data, reason in damaged(whole):
        (tmp_path / "cut.tar").write_bytes(data)
        tars = source(tmp_path / "cut.tar", tmp_path)
        records = [tars.record(item) for item in tars.list()]
        assert (records[0].source, records[0].image) == ("cut.tar/a.jpg", b"A" * 600), name
        assert (records[-1].source, records[-1].reason) == ("cut.tar", reason), name
        assert len(records) == (3 if name == "no end mark" else 2), name


def test_a_file_that_is_no_tar_fails_with_a_reason(tmp_path: Path) -> None:
    for data, reason in ((b"", "truncated_tar"), (b"PK" * 5000, "damaged_tar")):
        (tmp_path / "a.tar").write_bytes(data)
        tars = source(tmp_path / "a.tar", tmp_path)
        assert [tars.record(item).reason for item in tars.list()] == [reason]


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
    tars = source("memory://bucket/y.tar", tmp_path)
    assert [(item.source, tars.record(item).image) for item in tars.list()] == [
        ("y.tar/a.jpg", b"y")
    ]
    memory.rm("/bucket", recursive=True)
    for wrong in ("sub/x-{000..009}.tar", "none/*.tar", "sub/x-{000.tar", "gone.tar"):
        with pytest.raises(SourceError):
            listed(tmp_path / wrong, tmp_path)


def test_shards_of_an_output_inside_the_folder_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "out" / "shards").mkdir(parents=True)
    write_tar(tmp_path / "out" / "shards" / "fgid-000000.tar", {"a.jpg": b"x"})
    write_tar(tmp_path / "y.tar", {"a.jpg": b"y"})
    assert list(listed(tmp_path, tmp_path, "source.kind=webdataset")) == ["y.tar/a.jpg"]


def test_a_tar_changed_or_deleted_since_it_was_listed_fails_with_a_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 100})
    tars = source(tmp_path / "a.tar", tmp_path, "resize.max_bytes=100")
    (item,) = tars.list()
    assert tars.read(item, 3) == b"xxx"
    limited = source(tmp_path / "a.tar", tmp_path, "resize.max_bytes=99")
    assert limited.record(item).reason == "too_many_bytes"
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:550])
    assert tars.record(item).reason == "unreadable"
    (tmp_path / "a.tar").unlink()
    assert tars.record(item).reason == "not_a_file"


def test_a_server_without_range_requests_is_reported(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 100})
    whole = (tmp_path / "a.tar").read_bytes()

    def without_length(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(whole)

    with serving() as server:
        server.answers = {"/a.tar": plain(whole), "/b.tar": without_length}
        tars = source(f"{server.url}/a.tar", tmp_path)
        assert [tars.record(item).reason for item in tars.list()] == ["unreadable"]
        with pytest.raises(SourceError, match="Copy it here first"):
            list(source(f"{server.url}/b.tar", tmp_path).list())


def test_the_ledger_of_tars_balances(portraits: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted(portraits.glob("*.jpg"))[:2]]
    write_tar(
        tmp_path / "x.tar",
        {"a.jpg": files[0], "b.jpg": files[1], "c.jpg": files[0], "d.jpg": "/etc/passwd"},
    )
    whole = (tmp_path / "x.tar").read_bytes()
    without_end = whole.rstrip(b"\0")
    (tmp_path / "x.tar").write_bytes(without_end + bytes(512 - len(without_end) % 512))
    ledger = run(config(tmp_path / "x.tar", tmp_path / "out"))
    assert (ledger.inputs, ledger.written, dict(ledger.dropped)) == (5, 2, {"duplicate": 1})
    assert dict(ledger.failed) == {"not_a_file": 1, "truncated_tar": 1}
