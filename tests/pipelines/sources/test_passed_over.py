"""Pictures with other endings, linked folders and folders that can't be listed are reported: after
the plan, in dataset.json and in the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs.errors import SourceError
from configs.schema import SourceConfig
from pipelines.cli import app
from pipelines.report import write_report
from pipelines.run import plan_job, run
from pipelines.sources import build_source, files
from pipelines.sources.passed_over import Group, Kind, PassedOver
from stages.formats import READABLE_ENDINGS
from stages.storage.layout import DATASET, REPORT
from stages.storage.store import Store
from tests.pipelines.helpers import config, stamps
from tests.pipelines.sources.corpus_formats import encoded, heif, jpeg
from tests.pipelines.stub_chain import Scene, stub_chain

SQUARE = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
JPEG_ONLY = "source.extensions=[.jpg]"


def passed_over(path: Path | str, output: Path, *settings: str) -> PassedOver:
    source = build_source(config(path, output, *settings))
    list(source.list())
    return source.passed_over


def test_images_with_other_endings_are_found_by_their_contents(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    contents = {
        "a.jpg": jpeg(SQUARE),
        "b.jfif": jpeg(SQUARE),
        "c.JFIF": jpeg(SQUARE),
        "d.dat": encoded(SQUARE, "AVIF"),
        "e.heic": heif(SQUARE),
        "f": encoded(SQUARE, "WEBP"),
        "g.psd": b"8BPS\0\1" + bytes(30),
        "h.nef": encoded(SQUARE, "TIFF"),
        "notes.txt": b"BM is how this text begins",
        "empty.dat": b"",
        "short.dat": b"\0\0\0",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "a link.jfif").symlink_to("b.jfif")
    # none of these may be opened
    (folder / "dangling.dat").symlink_to("nowhere")
    (folder / "endless.dat").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.dat")
    report = passed_over(folder, tmp_path / "out", JPEG_ONLY)
    assert report.groups == [
        Group(Kind.IMAGE, ".jfif", 3, "a link.jfif"),
        Group(Kind.IMAGE, "", 1, "f"),
        Group(Kind.IMAGE, ".dat", 1, "d.dat"),
        Group(Kind.IMAGE, ".heic", 1, "e.heic"),
        Group(Kind.UNSUPPORTED_IMAGE, ".nef", 1, "h.nef"),
        Group(Kind.UNSUPPORTED_IMAGE, ".psd", 1, "g.psd"),
    ]
    images, unsupported = report.lines([".jpg"])
    assert images.startswith("passed over: 6 files with the contents")
    assert ".jfif 3, no ending 1, .dat 1, .heic 1; for example a link.jfif" in images
    assert "'source.extensions=[.jpg,.jfif,.dat,.heic]'" in images and "Rename" in images
    assert "2 images of formats" in unsupported and "h.nef" not in unsupported
    assert PassedOver.from_json(json.loads(json.dumps(report.to_json()))) == report
    # the setting, as it is printed, has the effect that is promised
    setting = images[images.index("source.extensions=") :].partition("'")[0]
    assert [group.ending for group in passed_over(folder, tmp_path / "out", setting).groups] == [
        *("", ".nef", ".psd")
    ]


def test_linked_and_unlisted_folders_are_found(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "b.jpg").write_bytes(jpeg(SQUARE))
    (folder / "deep" / "linked").symlink_to(elsewhere)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "inside").symlink_to("deep")  # listed as deep
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(25):  # too deep to be listed by its path, also by root
        os.mkdir("x" * 200, dir_fd=handle)
        inner = os.open("x" * 200, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    linked, unlisted = passed_over(folder, tmp_path / "out").groups
    assert linked == Group(Kind.LINKED_FOLDER, "", 2, "deep/linked")
    assert (unlisted.kind, unlisted.count) == (Kind.UNLISTED_FOLDER, 1)
    assert unlisted.example.startswith("xxx")


def test_a_glob_reports_what_could_match_it_only(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("a.dat", "b.dat", "deep/a.dat"):
        (folder / name).write_bytes(jpeg(SQUARE))
    (folder / "linked").symlink_to(elsewhere)
    for glob, expected in {
        "a*": ["a.dat"],
        "*/a*": ["deep/a.dat", "linked"],
        "deep*/*": ["deep/a.dat"],
        "**": ["a.dat", "linked"],
        "**/a*": ["a.dat", "linked"],
    }.items():
        groups = passed_over(folder / glob, tmp_path / "out").groups
        assert [group.example for group in groups] == expected, glob


def test_the_listing_opens_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    read = files.read_file

    def counted(path: bytes, max_bytes: int, count: int = -1) -> bytes:
        opened.append(path)
        assert count == 64
        return read(path, max_bytes, count)

    monkeypatch.setattr(files, "read_file", counted)
    for number in range(1100):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
        (tmp_path / f"{number}.txt").write_bytes(b"a label")
        (tmp_path / f"{number}.dat").write_bytes(jpeg(SQUARE))
    report = passed_over(tmp_path, tmp_path / "out")
    assert [(group.ending, group.count) for group in report.groups] == [(".dat", 1100)]
    endings = [path.rpartition(b".")[2] for path in opened]
    assert (endings.count(b"jpg"), endings.count(b"txt"), endings.count(b"dat")) == (0, 1000, 1100)


def test_many_endings_take_bounded_memory() -> None:
    report = PassedOver()
    report.add(Kind.IMAGE, "name", "." + "e" * 300)
    assert [group.ending for group in report.groups] == ["*"]
    for number in range(5000):
        report.add(Kind.IMAGE, "n" * 5000, f".{number}")
    assert len(report.groups) <= 101
    assert sum(group.count for group in report.groups) == 5001
    assert max(len(group.example) for group in report.groups) <= 300
    (line,) = report.lines()
    assert len(line) < 1000 and "other endings" in line


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    memory = fsspec.filesystem("memory")
    for name in ("a.jpg", "b.jfif", "deep/c.heic", "d.psd", "e.dat", "/f.jpg", "deep//g.jpg"):
        memory.pipe(f"/passed-over/{name}", jpeg(SQUARE))
    yield "memory://passed-over"
    memory.rm("/passed-over", recursive=True)


def test_of_remote_files_only_names_are_looked_at(bucket: str, tmp_path: Path) -> None:
    report = passed_over(bucket, tmp_path, JPEG_ONLY)
    assert [(group.kind, group.example) for group in report.groups] == [
        (Kind.IMAGE, "deep/c.heic"),
        (Kind.IMAGE, "b.jfif"),
        (Kind.UNSUPPORTED_IMAGE, "d.psd"),
        (Kind.EMPTY_NAME, ".//"),
    ]
    assert report.lines()[-1].startswith("passed over: 2 folders of objects with // in their names")
    examples = [g.example for g in passed_over(f"{bucket}/b*", tmp_path, JPEG_ONLY).groups]
    assert examples[0] == "b.jfif" and "d.psd" not in examples


def test_a_run_reports_it_below_the_plan_and_in_the_report(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(Scene(person="anna").encode())
    evil = "<img src=x>\x1b[31m.gif"
    (folder / evil).write_bytes(encoded(SQUARE, "GIF"))
    arguments = ["run", "-c", "configs/dataset/demo.yaml", f"source.path={folder}"]
    done = CliRunner().invoke(app, [*arguments, f"output={output}", "--dry-run"])
    assert done.exit_code == 0, done.output
    plan, line, *_ = done.stdout.splitlines()
    assert plan.startswith("plan: 1 inputs in 1 shards")
    assert line.startswith("  passed over: 1 file with") and r"<img src=x>\x1b[31m.gif" in line
    assert ",.bmp,.gif]'" in line
    assert not output.exists()

    run(config(folder, output), chain=stub_chain)
    stored = json.loads((output / DATASET).read_bytes())["passed_over"]
    assert stored == [{"kind": "image", "ending": ".gif", "count": 1, "example": evil}]
    write_report(Store(str(output)))
    page = (output / REPORT).read_text()
    assert page.count("passed over: 1 file with") == 1
    assert "&lt;img src=x&gt;" in page and "<img src=x>" not in page and "\x1b" not in page
    # what is passed over now is stored, though no shard changes
    before = stamps(output)
    (folder / evil).unlink()
    run(config(folder, output), chain=stub_chain)
    assert json.loads((output / DATASET).read_bytes())["passed_over"] == []
    assert stamps(output) == before


def test_a_source_of_other_endings_only_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encoded(SQUARE, "GIF"))
    with pytest.raises(SourceError, match=r"holds no \.jpg.*passed over: 1 file.*\.bmp,\.gif\]"):
        plan_job(config(tmp_path, tmp_path.with_name("out")))


def test_the_listed_endings_are_those_of_formats_that_are_read() -> None:
    assert {*SourceConfig().extensions} < READABLE_ENDINGS
