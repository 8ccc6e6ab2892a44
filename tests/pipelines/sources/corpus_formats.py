"""Builds and edits image files byte by byte: PNG chunks, JPEG segments, and encodings that Pillow
can read but not write.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image

Pixels = npt.NDArray[np.uint8]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    with io.BytesIO() as out:
        image.save(out, kind, **options)
        return out.getvalue()


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encoded(image, "JPEG", **{"quality": 90, **options})


def heif(image: Image.Image, exif: bytes | None = None) -> bytes:
    """A HEIF file, turned as `exif` says."""
    file = pillow_heif.from_pillow(image)
    file.info["exif"] = exif
    with io.BytesIO() as out:
        file.save(out)
        return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, stream: bytes, depth: int = 8, color: int = 2, interlaced: int = 0
) -> bytes:
    """color: 0 grey, 2 RGB. stream: the rows of pixels, compressed by zlib."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def packed(byte: bytes, size: int) -> bytes:
    """`byte` repeated `size` times, compressed by zlib without holding it in memory as a whole."""
    compressor, block = zlib.compressobj(1), byte * (1 << 20)
    return b"".join([*(compressor.compress(block) for _ in range(size >> 20)), compressor.flush()])


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk, directly after its header."""
    return data[:33] + chunk(kind, content) + data[33:]


def animated(width: int, height: int, frames: int) -> bytes:
    """A black APNG of `frames` frames, each of which unpacks to 16 MB, more than its pixels."""

    def control(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, 10, 0, 0))

    stream = packed(b"\0", 16 << 20)
    first = png(width, height, stream)
    more = (
        control(2 * n - 1) + chunk(b"fdAT", struct.pack(">I", 2 * n) + stream)
        for n in range(1, frames)
    )
    with_count = with_chunk(first, b"acTL", struct.pack(">II", frames, 0))
    data = chunk(b"IDAT", stream)
    return with_count.replace(data, control(0) + data)[:-12] + b"".join(more) + first[-12:]


def interlaced(pixels: Pixels) -> bytes:
    """An RGB PNG in Adam7's seven passes."""
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    lines = b""
    for x, y, right, down in passes:
        part = pixels[y::down, x::right]
        lines += b"".join(b"\0" + line.tobytes() for line in part)
    return png(pixels.shape[1], pixels.shape[0], zlib.compress(lines), interlaced=1)


def sixteen_bit(pixels: Pixels) -> bytes:
    """An RGB PNG of 16 bits a channel."""
    lines = b"".join(b"\0" + line.tobytes() for line in (pixels.astype(">u2") * 257).astype(">u2"))
    return png(pixels.shape[1], pixels.shape[0], zlib.compress(lines), depth=16)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment before the first scan's data; last the scan's header."""
    place = 2
    while True:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place, place + 2 + length
        if marker == 0xDA:
            return
        place += 2 + length


def frame(data: bytes) -> int:
    """The offset of the frame header (SOF)."""
    return next(start for marker, start, _ in segments(data) if 0xC0 <= marker <= 0xC2)


def scan(data: bytes) -> int:
    """The offset of the first scan's data."""
    return max(end for _, _, end in segments(data))


def patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def without(data: bytes, marker: int) -> bytes:
    """The JPEG without its segments of this marker."""
    for kind, start, end in reversed(list(segments(data))):
        if kind == marker:
            data = data[:start] + data[end:]
    return data


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """The JPEG with one more segment, directly after its first two bytes."""
    header = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2)
    return data[:2] + header + content + data[2:]


def ycck(image: Image.Image) -> bytes:
    """A CMYK JPEG as Adobe writes it by default: inverted CMY as YCbCr, and K; its Adobe segment
    states transform 2.
    """
    inverse = Image.fromarray(255 - np.asarray(image.convert("RGB"))).convert("YCbCr")
    planes = [Image.fromarray(255 - np.asarray(plane)) for plane in inverse.split()]
    data = jpeg(Image.merge("CMYK", [*planes, Image.new("L", image.size, 0)]), subsampling=0)
    adobe = next(start for marker, start, _ in segments(data) if marker == 0xEE)
    return patched(data, adobe + 15, b"\x02")


def many_scans(side: int, count: int) -> bytes:
    """A progressive grey JPEG of side × side pixels with over `count` scans.

    Each scan is a few bytes (one end-of-band run for all blocks), but takes a pass over the image.
    """
    data = jpeg(Image.new("L", (side, side), 128), progressive=True)
    first = scan(data)
    last = data.rindex(b"\xff\xda")
    return data[:first] + data[first:last] + data[last:-2] * count + data[-2:]
