"""Writes a folder with the usual bad and unusual image files, for the demo and the tests."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the pipeline makes of a file with the demo's configuration; reason: "" if ok."""

    status: str
    reason: str = ""


POISONED_FACES = 8  # portraits that the files are made from
EXPECTED: dict[str, Outcome] = {
    "truncated.jpg": Outcome("failed", "truncated"),
    "zero bytes.jpg": Outcome("failed", "empty_file"),
    "page.jpg": Outcome("failed", "not_an_image"),
    "bomb.png": Outcome("failed", "too_many_pixels"),
    "no face.png": Outcome("dropped", "no_face"),
    "three faces.jpg": Outcome("dropped", "too_many_faces"),
    "tiny.png": Outcome("dropped", "too_small"),
    "second copy.jpg": Outcome("dropped", "duplicate"),
    "folder.jpg": Outcome("failed", "not_a_file"),
    "dangling.jpg": Outcome("failed", "not_a_file"),
    "exif.rotated.jpg": Outcome("ok"),
    "cmyk.jpg": Outcome("ok"),
    "sixteen bit.png": Outcome("ok"),
    "ünïcode/alpha.png": Outcome("ok"),
    "ünïcode/animated.webp": Outcome("ok"),
    "original.jpg": Outcome("ok"),
    "phone.heic": Outcome("ok"),
    "web.avif": Outcome("ok"),
}


def write_poisoned(folder: Path, portraits: Sequence[Path]) -> None:
    """Write every file of EXPECTED into `folder`, from the first POISONED_FACES of `portraits`.

    Raises ValueError if there are fewer.
    """
    chosen = portraits[:POISONED_FACES]
    faces = [Image.open(path).convert("RGB").resize((512, 512)) for path in chosen]
    if len(faces) < POISONED_FACES:
        raise ValueError(f"{len(faces)} portraits, expected at least {POISONED_FACES}")
    (folder / "ünïcode").mkdir(parents=True, exist_ok=True)
    original = _jpeg(faces[0])
    _write(folder / "original.jpg", original)
    _write(folder / "second copy.jpg", original)
    _write(folder / "truncated.jpg", original[: len(original) // 2])
    _write(folder / "zero bytes.jpg", b"")
    _write(folder / "page.jpg", b"<!doctype html><title>404</title><script>alert(1)</script>")
    _write(folder / "bomb.png", _bomb(50_000))
    _write(folder / "no face.png", _png(_landscape()))
    _write(folder / "three faces.jpg", _jpeg(_row([face.resize((320, 320)) for face in faces[:3]])))
    _write(folder / "tiny.png", _png(faces[0].resize((40, 40))))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer rotates the stored pixels by 90° clockwise
    stored = faces[1].transpose(Image.Transpose.ROTATE_90)
    _write(folder / "exif.rotated.jpg", _jpeg(stored, exif=exif))
    _write(folder / "cmyk.jpg", _jpeg(faces[2].convert("CMYK")))
    grey = np.asarray(faces[3].convert("L"), np.uint16) * 257
    _write(folder / "sixteen bit.png", _png(Image.fromarray(grey)))
    alpha = faces[4].convert("RGBA")
    alpha.putalpha(Image.new("L", alpha.size, 250))
    _write(folder / "ünïcode/alpha.png", _png(alpha))
    with io.BytesIO() as out:
        faces[5].save(
            out, "WEBP", save_all=True, append_images=[faces[6]], duration=100, quality=90
        )
        _write(folder / "ünïcode/animated.webp", out.getvalue())
    with io.BytesIO() as out:
        pillow_heif.from_pillow(faces[6]).save(out, quality=90)
        _write(folder / "phone.heic", out.getvalue())
    with io.BytesIO() as out:
        faces[7].save(out, "AVIF", quality=90)
        _write(folder / "web.avif", out.getvalue())
    (folder / "folder.jpg").mkdir(exist_ok=True)
    dangling = folder / "dangling.jpg"
    if not dangling.is_symlink():
        dangling.symlink_to("nowhere.jpg")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _jpeg(image: Image.Image, **options: object) -> bytes:
    with io.BytesIO() as out:
        image.save(out, "JPEG", quality=92, **options)
        return out.getvalue()


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as out:
        image.save(out, "PNG")
        return out.getvalue()


def _row(images: Sequence[Image.Image]) -> Image.Image:
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for index, image in enumerate(images):
        row.paste(image, (index * width, 0))
    return row


def _landscape() -> Image.Image:
    """A smooth sky over grass, without a face."""
    y = np.linspace(0, 1, 400)[:, None]
    x = np.linspace(0, 1, 600)[None, :]
    sky = np.stack([90 + 80 * y + 0 * x, 150 + 60 * y + 0 * x, 230 - 20 * y + 0 * x], -1)
    grass = np.stack([60 + 30 * x + 0 * y, 130 - 40 * y + 10 * x, 50 + 0 * x * y], -1)
    return Image.fromarray(np.where((y < 0.6)[..., None], sky, grass).astype(np.uint8))


def _bomb(side: int) -> bytes:
    """A valid PNG of a few kilobytes that declares side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(8000)))
        + chunk(b"IEND", b"")
    )
