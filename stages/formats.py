"""Formats: tells the format of an encoded image from its first bytes.

`resize` reads those of READABLE. Sources use the same table to find images under other endings.
"""

from __future__ import annotations

from typing import Final

HEAD: Final = 64  # bytes that `format_of` needs; it takes more

READABLE: Final = frozenset({"JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF", "AVIF", "HEIF"})
# endings of images in READABLE, and of those that can't be read
READABLE_ENDINGS: Final = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp"),
        *(".dib", ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".heics", ".heifs", ".hif"),
    )
)
# the files of many cameras begin like a TIFF, whose first picture is only a preview
_RAW_ENDINGS: Final = frozenset(
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos"),
        *(".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw"),
    )
)
UNREADABLE_ENDINGS: Final = _RAW_ENDINGS | frozenset(
    (".exr", ".j2k", ".jp2", ".jpx", ".jxl", ".psb", ".psd", ".svg", ".svgz")
)
_SIGNATURES: Final = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS\0", "Photoshop"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIRO", "camera raw"),  # Olympus
    (b"IIRS", "camera raw"),
    (b"IIU\0", "camera raw"),  # Panasonic
    (b"<svg", "SVG"),
)
# the lengths that a BMP's second header may have
_BMP_HEADERS: Final = frozenset(
    size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)
)
_HEIF_BRANDS: Final = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
)


def format_of(head: bytes, ending: str = "") -> str:
    """Returns the format's name, such as "JPEG", or "" if `head` begins like no image.

    head: the file's first HEAD bytes, or all of them. ending: of the file's name, lower case with
    a dot, for camera raw files that begin like a TIFF.
    """
    kind = next((name for start, name in _SIGNATURES if head.startswith(start)), "")
    if kind == "TIFF" and ending in _RAW_ENDINGS:
        return "camera raw"
    if kind:
        return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    # "BM" begins ordinary text too; the header's length is at byte 14
    if head.startswith(b"BM") and head[14:18] in _BMP_HEADERS:
        return "BMP"
    return _box_format(head) if head[4:8] == b"ftyp" else ""


def _box_format(data: bytes) -> str:
    """Returns the format of a file of ISO base media boxes, from the brands in its first box.

    The major brand may be that of the container (mif1, msf1), which AVIF and HEIF share.
    """
    end = int.from_bytes(data[:4], "big")
    brands = [data[at : at + 4] for at in (8, *range(16, min(end, len(data)) - 3, 4))]
    if brands[0] == b"crx ":
        return "camera raw"
    if brands[0] in (b"avif", b"avis"):
        return "AVIF"
    if brands[0] not in _HEIF_BRANDS:
        return ""
    is_avif = brands[0] in (b"mif1", b"msf1") and {b"avif", b"avis"} & {*brands}
    return "AVIF" if is_avif else "HEIF"


def is_cut(data: bytes) -> bool:
    """Returns whether an AVIF or HEIF file ends before the last of its boxes does."""
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size == 0:  # size 0: the box ends at the end of the file
            return False
        place += max(size, 8)
    return place != len(data)
