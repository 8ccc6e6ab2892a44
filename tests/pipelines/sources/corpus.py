"""A folder with every kind of bad or unusual file, generated on the spot, with the outcome to
expect of each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.demo.poison import Outcome
from tests.pipelines.sources import corpus_images as images
from tests.pipelines.sources.corpus_formats import encoded, jpeg
from tests.pipelines.sources.corpus_images import NO_FACE, NOT_AN_IMAGE, OK, SIDE, Case, Faces

NOT_A_FILE = Outcome("failed", "not_a_file")
TOO_MANY_BYTES = Outcome("failed", "too_many_bytes")
TOO_SMALL = Outcome("dropped", "too_small")
EXTREME_ASPECT = Outcome("dropped", "extreme_aspect")


def write_files(folder: Path, faces: Faces) -> dict[str, Outcome]:
    """Writes the whole corpus into `folder`; returns source → expected outcome."""
    families = (
        images.good,
        images.cut,
        images.jpegs,
        images.pngs,
        images.bombs,
        images.animations,
        images.other_formats,
        images.metadata,
        shapes,
        contents,
        names,
    )
    expected: dict[str, Outcome] = {}
    for family in families:
        for case in family(faces):
            assert case.name not in expected, case.name
            (folder / case.name).write_bytes(case.data)
            expected[case.name] = case.expected
    return expected | undecodable_names(folder) | irregular_files(folder) | oversized_files(folder)


def shapes(faces: Faces) -> Iterator[Case]:
    for width, height in ((1, 1), (1, 10_000), (10_000, 1), (63, 63)):
        data = encoded(Image.new("RGB", (width, height)), "PNG")
        yield Case(f"{width} by {height}.png", data, TOO_SMALL)
    for width, height in ((64, 6400), (2000, 100)):
        data = encoded(Image.new("RGB", (width, height)), "PNG")
        yield Case(f"{width} by {height}.png", data, EXTREME_ASPECT)


def contents(faces: Faces) -> Iterator[Case]:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    grain = np.random.default_rng(1).normal(0, 6, (200, 260, 1)) + np.zeros(3)
    wall = np.clip(170 + grain, 0, 255).astype(np.uint8)
    without_face = {
        "all black.png": Image.new("RGB", (200, 200)),
        "all white.jpg": Image.new("RGB", (200, 200), "white"),
        "noise.png": Image.fromarray(noise),
        "a wall.jpg": Image.fromarray(wall),
        "clear.png": Image.new("RGBA", (200, 200), (0, 0, 0, 0)),
    }
    for name, image in without_face.items():
        yield Case(name, encoded(image, "PNG" if name.endswith("png") else "JPEG"), NO_FACE)
    tiny = Image.new("RGB", (1024, 1024), "grey")
    tiny.paste(faces[0].resize((48, 48)), (480, 480))
    yield Case("tiny face.png", encoded(tiny, "PNG"), Outcome("dropped", "no_face_parsed"))
    many = Image.new("RGB", (3 * SIDE, SIDE))
    for index in range(3):
        many.paste(faces[index], (index * SIDE, 0))
    yield Case("many faces.jpg", jpeg(many), Outcome("dropped", "too_many_faces"))
    yield Case("upside down.jpg", jpeg(faces[1].rotate(180)), OK)


def names(faces: Faces) -> Iterator[Case]:
    odd = (
        "new\nline.jpg",
        "-rf.jpg",
        "'; DROP TABLE inputs; --.jpg",
        "<b>.jpg",
        "%s {0} $HOME.jpg",
        "tab\t\x1b[31m.jpg",
    )
    for number, name in enumerate((*odd, "ü" * 125 + "x.jpg", " .jpg", "c:\\a.jpg")):
        data = jpeg(faces[2], quality=60 + number) if number < 2 else b"text %d" % number
        yield Case(name, data, OK if number < 2 else NOT_AN_IMAGE)


def undecodable_names(folder: Path) -> dict[str, Outcome]:
    """A file name that isn't valid UTF-8: the record's source holds it with an escape sequence."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))
    path.write_bytes(b"text of another encoding")
    return {"caf\\xe9.jpg": NOT_AN_IMAGE}


def irregular_files(folder: Path) -> dict[str, Outcome]:
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "loop one.jpg").symlink_to("loop two.jpg")
    (folder / "loop two.jpg").symlink_to("loop one.jpg")
    (folder / "link to folder.jpg").symlink_to("folder.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    here = Path.cwd()
    os.chdir(folder)  # a socket's path is 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as unix_socket:
            unix_socket.bind("socket.jpg")
    finally:
        os.chdir(here)
    kinds = (
        "folder",
        "dangling",
        "loop one",
        "loop two",
        "link to folder",
        "endless",
        "pipe",
        "socket",
    )
    return {f"{kind}.jpg": NOT_A_FILE for kind in kinds}


def oversized_files(folder: Path) -> dict[str, Outcome]:
    with (folder / "too long.jpg").open("wb") as stream:
        stream.truncate(100_000_001)  # a sparse file, which takes no space on the disk
    expected = {"too long.jpg": TOO_MANY_BYTES}
    # reports a size of 0 bytes and yields bytes without end, like a file that grows
    if Path("/proc/self/pagemap").is_file():
        (folder / "growing.jpg").symlink_to("/proc/self/pagemap")
        expected["growing.jpg"] = TOO_MANY_BYTES
    if os.geteuid():  # root can read any file
        (folder / "locked.jpg").write_bytes(b"x")
        (folder / "locked.jpg").chmod(0)
        expected["locked.jpg"] = Outcome("failed", "unreadable")
    return expected
