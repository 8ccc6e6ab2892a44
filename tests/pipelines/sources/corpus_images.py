"""Damaged and unusual image files, generated in memory, each with the outcome to expect.

Unusual files that can be decoded are expected to be written. Each function below yields the cases
of one family.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from pipelines.demo.poison import Outcome
from tests.pipelines.sources import corpus_formats as formats
from tests.pipelines.sources.corpus_formats import encoded, jpeg

OK = Outcome("ok")
DUPLICATE = Outcome("dropped", "duplicate")
NO_FACE = Outcome("dropped", "no_face")
TRUNCATED = Outcome("failed", "truncated")
UNDECODABLE = Outcome("failed", "undecodable")
NOT_AN_IMAGE = Outcome("failed", "not_an_image")
UNSUPPORTED = Outcome("failed", "unsupported_format")
TOO_MANY_PIXELS = Outcome("failed", "too_many_pixels")
SIDE = 320  # pixels of the corpus's portraits
BOMB = 384 << 20  # bytes that each bomb unpacks to


class Case(NamedTuple):
    name: str  # of the file
    data: bytes
    expected: Outcome


Faces = Sequence[Image.Image]  # four portraits, SIDE × SIDE, RGB


def load_faces(portraits: Path) -> Faces:
    paths = sorted(portraits.glob("*.jpg"))[:4]
    return [
        Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for path in paths
    ]


def good(faces: Faces) -> Iterator[Case]:
    """Sound images whose names sort between the others': a bad neighbour must not affect them."""
    kinds = {"a good.jpg": "JPEG", "g good.png": "PNG", "p good.webp": "WEBP", "z good.jpg": "JPEG"}
    for face, (name, kind) in zip(faces, kinds.items(), strict=True):
        yield Case(name, encoded(face, kind, quality=91), OK)
    yield Case("zz copy.jpg", encoded(faces[0], "JPEG", quality=91), DUPLICATE)


def cut(faces: Faces) -> Iterator[Case]:
    whole = {
        "jpg": jpeg(faces[0]),
        "progressive.jpg": jpeg(faces[0], progressive=True),
        "png": encoded(faces[0], "PNG"),
        "webp": encoded(faces[0], "WEBP"),
        "lossless.webp": encoded(faces[0], "WEBP", lossless=True),
        "gif.jpg": encoded(faces[0], "GIF"),
        "tiff.jpg": encoded(faces[0], "TIFF"),
        "bmp.jpg": encoded(faces[0], "BMP"),
        "avif": encoded(faces[0], "AVIF"),
        "heic": formats.heif(faces[0]),
    }
    for number, (kind, data) in enumerate(whole.items()):
        recognised = kind in ("png", "webp", "lossless.webp", "bmp.jpg", "avif", "heic")
        in_header = TRUNCATED if recognised else UNDECODABLE
        yield Case(f"cut in header.{kind}", data[: 20 + number], in_header)
        yield Case(f"cut in the middle.{kind}", data[: len(data) // 2], TRUNCATED)
        has_all_pixels = kind in ("png", "gif.jpg")
        yield Case(f"cut last byte.{kind}", data[:-1], OK if has_all_pixels else TRUNCATED)
    yield Case("no bytes.jpg", b"", Outcome("failed", "empty_file"))
    yield Case("one byte.jpg", b"\xff", NOT_AN_IMAGE)
    yield Case("only SOI.jpg", b"\xff\xd8", UNDECODABLE)
    yield Case("only SOI and EOI.jpg", b"\xff\xd8\xff\xd9", UNDECODABLE)
    yield Case("only zeros.png", bytes(5000), NOT_AN_IMAGE)


def jpegs(faces: Faces) -> Iterator[Case]:
    whole = jpeg(faces[1])
    size, start = formats.frame(whole) + 5, formats.scan(whole)
    yield Case("garbage between markers.jpg", whole[:20] + b"garbage" + whole[20:], UNDECODABLE)
    yield Case("zeros between markers.jpg", whole[:20] + bytes(7) + whole[20:], UNDECODABLE)
    yield Case(
        "garbage in scan.jpg",
        formats.patched(whole, start + 500, random.Random(0).randbytes(400)),
        UNDECODABLE,
    )
    yield Case(
        "header too high.jpg",
        formats.patched(whole, size, struct.pack(">HH", 2000, SIDE)),
        TRUNCATED,
    )
    yield Case(
        "header too low.jpg",
        formats.patched(whole, size, struct.pack(">HH", 100, SIDE)),
        UNDECODABLE,
    )
    yield Case(
        "header of no size.jpg", formats.patched(whole, size, struct.pack(">HH", 0, 0)), UNDECODABLE
    )
    yield Case(
        "header of 65500.jpg",
        formats.patched(whole, size, struct.pack(">HH", 65500, 65500)),
        TOO_MANY_PIXELS,
    )
    yield Case("arithmetic.jpg", formats.patched(whole, size - 4, b"\xc9"), UNDECODABLE)
    yield Case("lossless.jpg", formats.patched(whole, size - 4, b"\xc3"), UNDECODABLE)
    yield Case(
        "twelve bit.jpg",
        formats.patched(formats.patched(whole, size - 4, b"\xc1"), size - 1, b"\x0c"),
        UNDECODABLE,
    )
    yield Case("no tables.jpg", formats.without(whole, 0xC4), OK)  # the standard's tables apply
    cmyk = jpeg(faces[1].convert("CMYK"))
    yield Case("cmyk.jpg", cmyk, OK)
    yield Case("cmyk without Adobe.jpg", formats.without(cmyk, 0xEE), OK)
    yield Case("ycck.jpg", formats.ycck(faces[1]), OK)
    yield Case("grey.jpg", jpeg(faces[1].convert("L")), OK)
    yield Case("progressive.jpg", jpeg(faces[1], progressive=True), OK)
    yield Case(
        "many scans.jpg", formats.many_scans(1500, 1000), Outcome("failed", "too_many_scans")
    )
    yield Case("zip behind.jpg", whole + _zip({"a.txt": b"hello"}), OK)
    yield Case(
        "two pictures.jpg", encoded(faces[1], "MPO", save_all=True, append_images=[faces[2]]), OK
    )


def pngs(faces: Faces) -> Iterator[Case]:
    face = faces[2]
    pixels = np.asarray(face)
    whole = encoded(face, "PNG")
    yield Case("one bit.png", encoded(face.resize((4 * SIDE, 4 * SIDE)).convert("1"), "PNG"), OK)
    palette = face.quantize(64)
    yield Case(
        "palette with transparency.png",
        encoded(palette, "PNG", transparency=bytes(range(192, 256))),
        OK,
    )
    grey = np.asarray(face.convert("L"))
    yield Case(
        "sixteen bit grey.png", encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), OK
    )
    yield Case("sixteen bit.png", formats.sixteen_bit(pixels), OK)
    yield Case("interlaced.png", formats.interlaced(pixels), OK)
    yield Case("grey and alpha.png", encoded(face.convert("LA"), "PNG"), OK)
    yield Case("bad checksum of header.png", formats.patched(whole, 29, b"\0\0\0\0"), UNDECODABLE)
    data = whole.index(b"IDAT") + 500
    yield Case("bad checksum of data.png", formats.patched(whole, data, b"\0" * 9), UNDECODABLE)
    yield Case("no data.png", whole[:33] + formats.chunk(b"IEND", b""), UNDECODABLE)
    yield Case("no size.png", formats.png(0, 0, b""), UNDECODABLE)
    # the missing rows become black
    yield Case("short stream.png", formats.png(200, 200, zlib.compress(bytes(601 * 20))), NO_FACE)


def bombs(faces: Faces) -> Iterator[Case]:
    whole = encoded(faces[2], "PNG")
    packed = formats.packed(b"\0", BOMB)
    text = formats.packed(b"x", BOMB)
    yield Case("bomb declared.png", formats.png(50_000, 50_000, packed), TOO_MANY_PIXELS)
    yield Case("bomb in data.png", formats.png(100, 100, packed), NO_FACE)
    yield Case(
        "bomb in zTXt.png", formats.with_chunk(whole, b"zTXt", b"Comment\0\0" + text), UNDECODABLE
    )
    yield Case(
        "bomb in iTXt.png",
        formats.with_chunk(whole, b"iTXt", b"Comment\0\1\0\0\0" + text),
        UNDECODABLE,
    )
    yield Case(
        "bomb in iCCP.png", formats.with_chunk(whole, b"iCCP", b"profile\0\0" + text), UNDECODABLE
    )
    yield Case(
        "long tEXt.png", formats.with_chunk(whole, b"tEXt", b"Comment\0" + b"x" * (2 << 20)), OK
    )
    yield Case("bomb.gif.jpg", _gif_screen(65535, 65535), TOO_MANY_PIXELS)
    yield Case("bomb.webp", _webp_canvas(16383, 16383), TOO_MANY_PIXELS)
    yield Case(
        "bomb.bmp.jpg",
        formats.patched(encoded(faces[2], "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
        TOO_MANY_PIXELS,
    )
    yield Case("bomb animated.png", formats.animated(100, 100, BOMB >> 24), NO_FACE)


def animations(faces: Faces) -> Iterator[Case]:
    """The first frame, with a face, must be used; the others have none."""
    frames = {
        "save_all": True,
        "append_images": [Image.new("RGB", (SIDE, SIDE), "teal")] * 2,
        "duration": 50,
    }
    for kind in ("PNG", "WEBP", "GIF", "AVIF"):
        name = "animated gif.jpg" if kind == "GIF" else f"animated.{kind.lower()}"
        yield Case(name, encoded(faces[3], kind, **frames), OK)
    yield Case("lossless.webp", encoded(faces[3], "WEBP", lossless=True), OK)


def other_formats(faces: Faces) -> Iterator[Case]:
    face = faces[3]
    yield Case("bmp.jpg", encoded(face, "BMP"), OK)
    yield Case("tiff.jpg", encoded(face, "TIFF", compression="tiff_lzw"), OK)
    yield Case(
        "tiff of floats.jpg", encoded(Image.new("F", (100, 100), float("nan")), "TIFF"), NO_FACE
    )
    yield Case("avif.jpg", encoded(face, "AVIF"), OK)
    yield Case("heic.jpg", formats.heif(face), OK)
    yield Case("alpha.heif", formats.heif(face.convert("RGBa")), OK)
    yield Case("only ftyp.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), UNDECODABLE)
    unsupported = {
        "jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(500),
        "jp2": encoded(face.resize((64, 64)), "JPEG2000"),
        "psd": b"8BPS\0\1" + bytes(500),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>',
    }
    for kind, data in unsupported.items():
        yield Case(f"{kind}.jpg", data, UNSUPPORTED)
    others = {
        "ico": encoded(face, "ICO", sizes=[(64, 64)]),
        "pdf": encoded(face.resize((64, 64)), "PDF"),
        "eps": encoded(face.resize((64, 64)), "EPS"),
        "html": b"<!doctype html><title>404</title><script>alert(1)</script>",
        "zip": _zip({"face.jpg": jpeg(face)}),
        "exe": b"MZ" + bytes(58) + b"\x80\0\0\0" + bytes(64) + b"PE\0\0" + bytes(400),
        "text": b"not a picture\n",
    }
    for kind, data in others.items():
        yield Case(f"{kind}.jpg", data, NOT_AN_IMAGE)


def metadata(faces: Faces) -> Iterator[Case]:
    face = faces[0]
    noise = random.Random(1).randbytes(65_000)
    yield Case("exif garbage.jpg", formats.with_segment(jpeg(face), 0xE1, b"Exif\0\0" + noise), OK)
    # a directory that claims 65,535 entries, filled with random bytes
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + noise[:60_000]
    yield Case("exif broken.jpg", formats.with_segment(jpeg(face), 0xE1, broken), OK)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = face.transpose(_STORED[orientation]) if orientation in _STORED else face
        yield Case(f"orientation {orientation}.jpg", jpeg(stored, exif=exif), OK)
    yield Case("profile garbage.jpg", jpeg(face, icc_profile=noise), OK)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Case(
        "profile of CMYK.jpg", jpeg(face, icc_profile=formats.patched(srgb, 16, b"CMYK")), OK
    )
    yield Case("profile garbage.png", encoded(face, "PNG", icc_profile=noise), OK)


# EXIF orientation → how an upright image is transposed so that the orientation restores it
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def _zip(members: dict[str, bytes]) -> bytes:
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as packed:
            for name, data in members.items():
                packed.writestr(name, data)
        return out.getvalue()


def _gif_screen(width: int, height: int) -> bytes:
    """A GIF of a few bytes that declares a large screen."""
    whole = encoded(Image.new("P", (8, 8)), "GIF")
    return formats.patched(whole, 6, struct.pack("<HH", width, height))


def _webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP of a few bytes that declares a large canvas."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    whole = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    return formats.patched(whole, 24, size)
