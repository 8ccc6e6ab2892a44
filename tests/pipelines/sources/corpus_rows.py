"""Every kind of bad row in tars, parquet tables, FGID's layout and lists of URLs, generated on the
spot, with the outcome to expect.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.demo.poison import Outcome
from tests.pipelines.sources import corpus_formats as formats
from tests.pipelines.sources.corpus import NOT_A_FILE, TOO_MANY_BYTES
from tests.pipelines.sources.corpus_formats import jpeg
from tests.pipelines.sources.corpus_images import (
    DUPLICATE,
    NOT_AN_IMAGE,
    OK,
    SIDE,
    TOO_MANY_PIXELS,
    TRUNCATED,
    Faces,
)
from tests.pipelines.sources.server import Server, plain

MAX_BYTES = 1_000_000  # of an image
BOMB = formats.png(50_000, 50_000, b"")
OUTSIDE = Outcome("failed", "outside_source")
NO_IMAGE = Outcome("failed", "no_image")
DUPLICATE_NAME = Outcome("failed", "duplicate_name")
BAD_PARSING, BAD_EMBEDDING = Outcome("failed", "bad_parsing"), Outcome("failed", "bad_embedding")
BAD_URL, REFUSED = Outcome("failed", "bad_url"), Outcome("failed", "refused_address")


class Rows(NamedTuple):
    """A source, the settings it needs, and source name → outcome to expect."""

    path: Path
    settings: tuple[str, ...]
    expected: dict[str, Outcome]


class Member(NamedTuple):
    name: str
    expected: Outcome
    data: bytes = b"text"
    kind: bytes = tarfile.REGTYPE
    source: str = ""  # the record's source, if it isn't `name`


def tars(folder: Path, faces: Faces) -> Rows:
    whole = jpeg(faces[0])
    members = list(_members(whole, jpeg(faces[1])))
    (folder / "rows.tar").write_bytes(_tar(members))
    expected = {f"rows.tar/{member.source or member.name}": member.expected for member in members}
    first, end = Member("a.jpg", DUPLICATE, whole), 512 + -(-len(whole) // 512) * 512
    broken = {
        "cut.tar": (
            _tar([first, Member("b.jpg", TRUNCATED, bytes(5000))])[: len(whole) + 3000],
            "truncated_tar",
        ),
        "huge.tar": (_tar([first])[:end] + _header("b.jpg", 10 << 40), "truncated_tar"),
        "empty.tar": (b"", "truncated_tar"),
        "zip.tar": (b"PK\x03\x04" + bytes(5000), "damaged_tar"),
        "gzip.tar": (_tar([first], "w:gz"), "damaged_tar"),
    }
    for name, (data, reason) in broken.items():
        (folder / name).write_bytes(data)
        expected[name] = Outcome("failed", reason)
    expected |= {"cut.tar/a.jpg": OK, "huge.tar/a.jpg": DUPLICATE}
    return Rows(folder, ("source.kind=webdataset",), expected)


def _members(whole: bytes, second: bytes) -> Iterator[Member]:
    yield Member("a.jpg", DUPLICATE, whole)  # of the one in cut.tar, whose name sorts first
    yield Member("good.jpg", OK, second)
    yield Member("copy.jpg", DUPLICATE, whole)
    yield Member("twice.jpg", NOT_AN_IMAGE, b"first")
    yield Member("twice.jpg", DUPLICATE_NAME, b"second", source="twice.jpg (again, 1)")
    yield Member("../up.jpg", OUTSIDE)
    yield Member("/absolute.jpg", OUTSIDE)
    yield Member("good.jpg", DUPLICATE_NAME, source="good.jpg (again, 2)")
    kinds = {
        "symlink": b"2",
        "hardlink": b"1",
        "sparse": b"S",
        "folder": b"5",
        "pipe": b"6",
        "device": b"3",
    }
    for name, kind in kinds.items():
        yield Member(f"{name}.jpg", NOT_A_FILE, b"", kind)
    yield Member("long" * 100 + ".jpg", NOT_AN_IMAGE)
    yield Member("no text \udce9.jpg", NOT_AN_IMAGE, b"other text", source="no text \\xe9.jpg")
    yield Member("bomb.png", TOO_MANY_PIXELS, BOMB)
    yield Member("empty.jpg", Outcome("failed", "empty_file"), b"")
    yield Member("cut.jpg", TRUNCATED, whole[:5000])
    yield Member("large.jpg", TOO_MANY_BYTES, bytes(MAX_BYTES + 1))


def _tar(members: list[Member], mode: str = "w:") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.size, info.linkname = member.kind, len(member.data), "good.jpg"
            tar.addfile(info, io.BytesIO(member.data))
    return out.getvalue()


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def tables(folder: Path, faces: Faces) -> Rows:
    whole = jpeg(faces[2])
    cells: dict[bytes | None, Outcome] = {
        whole: OK,
        None: NO_IMAGE,
        b"": Outcome("failed", "empty_file"),
        b"text": NOT_AN_IMAGE,
        whole[:5000]: TRUNCATED,
        BOMB: TOO_MANY_PIXELS,
        bytes(MAX_BYTES + 1): TOO_MANY_BYTES,
    }
    paths: dict[str | None, Outcome] = {
        "sub/a.jpg": NOT_AN_IMAGE,
        "sub": NOT_A_FILE,
        "gone.jpg": NOT_A_FILE,
        "../cells.parquet": OUTSIDE,
        str(folder / "sub/a.jpg"): OUTSIDE,
        "file:///etc/passwd": OUTSIDE,
        "C:\\a.jpg": OUTSIDE,
        "nul\0.jpg": OUTSIDE,
        "x" * 5000: Outcome("failed", "unreadable"),
        "": NO_IMAGE,
        None: NO_IMAGE,
    }
    (folder / "sub").mkdir()
    (folder / "sub/a.jpg").write_bytes(b"text of a file")
    expected = {}
    for name, column, rows in (("cells.parquet", "image", cells), ("paths.parquet", "path", paths)):
        pq.write_table(pa.table({column: list(rows)}), folder / name)
        outcomes = enumerate(rows.values())
        expected |= {f"{name}#{number:09}": outcome for number, outcome in outcomes}
    _damaged_table(folder / "damaged.parquet", jpeg(faces[3]))
    damaged = {
        "damaged.parquet#000000000": OK,
        "damaged.parquet#000000001": Outcome("failed", "unreadable"),
    }
    return Rows(folder, ("source.kind=parquet",), expected | damaged)


def _damaged_table(path: Path, image: bytes) -> None:
    """Writes two row groups; the data page of the second is overwritten."""
    table = pa.table({"image": [image, bytes(range(256)) * 9]})
    pq.write_table(table, path, row_group_size=1, use_dictionary=False)
    with pq.ParquetFile(path) as written:
        start = written.metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(formats.patched(path.read_bytes(), start, b"\xff" * 40))


class TouchesFile:
    """Creates the file `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def fgid(folder: Path, faces: Faces) -> Rows:
    """A file `trace` in the folder would show that pickled code was run."""
    whole, labels = jpeg(faces[0]), np.zeros((SIDE, SIDE), np.uint8)
    unit = torch.nn.functional.normalize(torch.arange(1.0, 513.0)[None])
    identities: dict[str, tuple[Any, Outcome]] = {
        "good": (unit, OK),
        "wrong size": (torch.ones(1, 256), BAD_EMBEDDING),
        "two": (torch.ones(2, 512), BAD_EMBEDDING),
        "nan": (unit.where(unit < unit.max(), torch.nan), BAD_EMBEDDING),
        "infinite": (unit * torch.inf, BAD_EMBEDDING),
        "zero": (unit * 0, BAD_EMBEDDING),
        "code": (TouchesFile(folder / "trace"), BAD_EMBEDDING),
        "no tensor": ([1.0] * 512, BAD_EMBEDDING),
    }
    masks: dict[str, tuple[bytes, Outcome]] = {
        "mask of another size": (_png(labels[1:]), BAD_PARSING),
        "class 200": (_png(labels + np.uint8(200)), BAD_PARSING),
        "mask in colours": (_png(np.zeros((SIDE, SIDE, 3), np.uint8)), BAD_PARSING),
        "no mask": (whole, BAD_PARSING),
        "mask bomb": (BOMB, BAD_PARSING),
    }
    entries, expected = [], {}
    for number, name in enumerate([*identities, *masks]):
        identity, outcome = identities.get(name, (unit, OK))
        mask, outcome = masks.get(name, (_png(labels), outcome))
        (folder / f"{name}.jpg").write_bytes(whole + b"%d" % number)  # else they were duplicates
        (folder / f"{name}.png").write_bytes(mask)
        torch.save(identity, folder / f"{name}.bin")
        entries.append(_entry(name))
        expected[f"{name}.jpg"] = outcome
    for entry, outcome in _odd_entries(folder):
        entries.append(entry)
        expected[str(entry.get("resize_IMG") or f"entry {len(entries)}").lstrip("/")] = outcome
    (folder / "JSON_all.json").write_text(json.dumps(entries))
    return Rows(folder, ("source.kind=fgid",), expected)


def _entry(name: str) -> dict[str, Any]:
    files = {"resize_IMG": "jpg", "parsing_mask_IMG": "png", "id_embed_file_resize": "bin"}
    return {key: f"{name}.{extension}" for key, extension in files.items()} | {
        "vqa_llva": "Somebody.",
        "vqa_llva_facial": "A nose.",
    }


def _odd_entries(folder: Path) -> Iterator[tuple[dict[str, Any], Outcome]]:
    bad_entry = Outcome("failed", "bad_entry")
    (folder / "text.jpg").write_bytes(b"a text")
    yield {}, bad_entry
    yield {"vqa_llva": "nobody", "resize_IMG": None}, bad_entry
    yield {"resize_IMG": "text.jpg"}, NOT_AN_IMAGE
    yield {"resize_IMG": "gone.jpg"}, NOT_A_FILE
    yield {"resize_IMG": "../gone.jpg"}, OUTSIDE
    yield {"resize_IMG": "/etc/passwd"}, NOT_A_FILE


def _png(labels: Any) -> bytes:
    done, data = cv2.imencode(".png", labels)
    assert done
    return data.tobytes()


def refused_urls(folder: Path, faces: Faces) -> Rows:
    """URLs that must be refused before any request is sent."""
    expected = {
        "ftp://example.org/a.jpg": BAD_URL,
        "file:///etc/passwd": BAD_URL,
        "javascript:alert(1)": BAD_URL,
        "a.jpg": BAD_URL,
        "http://": BAD_URL,
        "http:///a.jpg": BAD_URL,
        "http://[::1/a.jpg": BAD_URL,
        "http://127.0.0.1:9/a.jpg": REFUSED,
        "http://2130706433/a.jpg": REFUSED,  # 127.0.0.1 as one number
        "http://10.0.0.1/a.jpg": REFUSED,
        "http://169.254.169.254/latest/meta-data": REFUSED,
        "http://[::1]/a.jpg": REFUSED,
        "http://[::ffff:10.0.0.1]/a.jpg": REFUSED,
    }
    (folder / "list.csv").write_text(
        "url,license\n" + "".join(f'"{url}",CC0\n' for url in expected) + ",CC0\n"
    )
    return Rows(folder / "list.csv", (), {**expected, "(no URL)": BAD_URL})


def served_urls(server: Server) -> Callable[[Path, Faces], Rows]:
    """Returns a function that sets the server's answers and writes a list of their URLs."""

    def write_list(folder: Path, faces: Faces) -> Rows:
        whole = jpeg(faces[1])
        answers = {
            "good.jpg": (plain(whole), OK),
            "gone.jpg": (plain(b"", status=404), Outcome("failed", "http_404")),
            "broken.jpg": (plain(b"", status=500), Outcome("failed", "http_500")),
            "endless.jpg": (endless, TOO_MANY_BYTES),
            "page.jpg": (plain(b"<!doctype html>"), NOT_AN_IMAGE),
            "nothing.jpg": (plain(b""), Outcome("failed", "empty_file")),
            "cut.jpg": (plain(whole[:5000]), TRUNCATED),
            "short.jpg": (
                plain(whole, ("Content-Length", "999999")),
                Outcome("failed", "cut_off"),
            ),
            "bomb.png": (plain(BOMB), TOO_MANY_PIXELS),
            "loop.jpg": (
                plain(b"", ("Location", "/loop.jpg"), status=302),
                Outcome("failed", "too_many_redirects"),
            ),
            "away.jpg": (plain(b"", ("Location", "file:///etc/passwd"), status=302), BAD_URL),
        }
        server.answers = {f"/{name}": answer for name, (answer, _) in answers.items()}
        expected = {f"{server.url}/{name}": outcome for name, (_, outcome) in answers.items()}
        (folder / "list.txt").write_text("\n".join(expected))
        settings = (
            "source.allow_private=true",
            "source.tries=1",
            "source.timeout=5",
            f"resize.max_bytes={MAX_BYTES}",
        )
        return Rows(folder / "list.txt", settings, expected)

    return write_list


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 4096)


def unusable_sources() -> Iterator[tuple[str, bytes, str, str]]:
    """(file name, content, source.kind, part of the error message)."""
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [1, 2]}), table)
    yield "numbers.parquet", table.getvalue(), "parquet", "holds int64; expected bytes"
    yield "cut.parquet", table.getvalue()[:-9], "parquet", "no whole parquet file"
    yield "text.parquet", b"text", "parquet", "no whole parquet file"
    yield (
        "columns.csv",
        b"address,license\nhttp://example.org/a.jpg,CC0\n",
        "urls",
        "no column source.url_column='url'",
    )
    yield "none.csv", b"", "urls", "no column source.url_column='url'. It has none"
    yield "text.json", b"not JSON", "fgid", "entry 1 can't be read"
    yield "numbers.json", b"[1, 2]", "fgid", "entry 1 can't be read"
    yield "strings.json", b'[{"resize_IMG": "a.jpg"}, "b.jpg"]', "fgid", "entry 2 can't be read"
    yield "cut.json", b'[{"resize_IMG": "a.jpg"}, {"resize', "fgid", "entry 2 can't be read"
    yield "deep.json", b'[{"a":' + b"[" * 100_000, "fgid", "entry 1 can't be read"
    yield "binary.json", bytes(range(128, 256)), "fgid", "entry 1 can't be read"
