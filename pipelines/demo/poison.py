"""A small set of everything that goes wrong in a folder of pictures, made on the spot: for the demo
and the tests.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Expected:
    """What the pipeline should say of a file: status, reason ("" where ok), for the demo's
    configuration.
    """

    status: str
    reason: str = ""


EXPECTED: dict[str, Expected] = {
    "truncated.jpg": Expected("failed", "truncated"),
    "zero bytes.jpg": Expected("failed", "empty_file"),
    "page.jpg": Expected("failed", "not_an_image"),
    "bomb.png": Expected("failed", "too_many_pixels"),
    "no face.png": Expected("dropped", "no_face"),
    "three faces.jpg": Expected("dropped", "too_many_faces"),
    "tiny.png": Expected("dropped", "too_small"),
    "second copy.jpg": Expected("dropped", "duplicate"),
    "folder.jpg": Expected("failed", "not_a_file"),
    "dangling.jpg": Expected("failed", "not_a_file"),
    "exif.rotated.jpg": Expected("ok"),
    "cmyk.jpg": Expected("ok"),
    "sixteen bit.png": Expected("ok"),
    "ünïcode/alpha.png": Expected("ok"),
    "ünïcode/animated.webp": Expected("ok"),
    "original.jpg": Expected("ok"),
}


def write_poisoned(folder: Path, portraits: Sequence[Path]) -> None:
    """Write every file of EXPECTED under `folder`, from at least seven portraits."""
    faces = [Image.open(path).convert("RGB").resize((512, 512)) for path in portraits[:7]]
    if len(faces) < 7:
        raise ValueError(f"{len(faces)} portraits given, expected at least 7")
    (folder / "ünïcode").mkdir(parents=True, exist_ok=True)
    whole = _jpeg(faces[0])
    _write(folder / "original.jpg", whole)
    _write(folder / "second copy.jpg", whole)
    _write(folder / "truncated.jpg", whole[: len(whole) // 2])
    _write(folder / "zero bytes.jpg", b"")
    _write(folder / "page.jpg", b"<!doctype html><title>404</title><script>alert(1)</script>")
    _write(folder / "bomb.png", _bomb(50_000))
    _write(folder / "no face.png", _png(_landscape()))
    _write(folder / "three faces.jpg", _jpeg(_row([face.resize((320, 320)) for face in faces[:3]])))
    _write(folder / "tiny.png", _png(faces[0].resize((40, 40))))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # shown turned by a quarter: the pixels lie on their side
    _write(
        folder / "exif.rotated.jpg",
        _jpeg(faces[1].transpose(Image.Transpose.ROTATE_90), exif=rotated),
    )
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
    """Sky over grass: smooth, coloured, and nobody in it."""
    y = np.linspace(0, 1, 400)[:, None]
    x = np.linspace(0, 1, 600)[None, :]
    sky = np.stack([90 + 80 * y + 0 * x, 150 + 60 * y + 0 * x, 230 - 20 * y + 0 * x], -1)
    grass = np.stack([60 + 30 * x + 0 * y, 130 - 40 * y + 10 * x, 50 + 0 * x * y], -1)
    return Image.fromarray(np.where((y < 0.6)[..., None], sky, grass).astype(np.uint8))


def _bomb(side: int) -> bytes:
    """A valid PNG of a few kilobytes that declares side² pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(8000)))
        + chunk(b"IEND", b"")
    )
