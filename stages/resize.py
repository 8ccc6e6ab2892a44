"""Resize: converts any image to an upright RGB JPEG of the working size.

The size that a header declares and the number of a JPEG's scans are checked before pixels are
decoded, so decompression bombs cost no time or memory. EXIF orientation is applied. CMYK, 16-bit,
palette and alpha images become RGB; of an animation the first frame is used, of a HEIF file the
primary image.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import cv2
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage

from configs.schema import ResizeConfig
from stages.base import Dropped, Failed, RecordStage
from stages.codec import Image, decode_jpeg, encode_jpeg
from stages.formats import READABLE, format_of, is_cut
from stages.record import Record

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# libjpeg-turbo's own limit for untrusted files (TJFLAG_LIMITSCANS); ordinary files have about ten
_MAX_SCANS: Final = 500
# a JPEG marker, except for those inside a scan's data (stuffing and restart markers)
_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_ORIENTATION: Final = 0x0112  # EXIF tag; 1 is upright


class ResizeStage(RecordStage):
    name = "resize"
    version = 4
    requires = ("image",)
    provides = ("image", "width", "height", "source_width", "source_height")
    config: ResizeConfig

    def process_one(self, record: Record) -> Record:
        with _open(record.image, self.config) as opened:
            pixels = self._resize(_decode(opened, record.image, self.config))
            source_width, source_height = _upright_size(opened)
        height, width = pixels.shape[:2]
        return replace(
            record,
            image=encode_jpeg(pixels, self.config.jpeg_quality),
            width=width,
            height=height,
            source_width=source_width,
            source_height=source_height,
        )

    def _resize(self, image: Image) -> Image:
        height, width = image.shape[:2]
        short, long = sorted((height, width))
        if short < self.config.min_side:
            raise Dropped("too_small", f"{width}×{height}, short side under {self.config.min_side}")
        if long > self.config.max_aspect * short:
            raise Dropped(
                "extreme_aspect", f"{width}×{height}, longer than {self.config.max_aspect}:1"
            )
        size = self.config.size
        target = (size, size)
        if self.config.mode == "short_side":
            target = (round(width * size / short), round(height * size / short))
        if target == (width, height):
            return image
        is_smaller = target[0] * target[1] < width * height
        method = cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(image, target, interpolation=method), np.uint8)


def decode(data: bytes, config: ResizeConfig) -> Image:
    """Returns the image in encoded `data`, upright RGB (H, W, 3) uint8.

    At full size, except for a JPEG at least twice as large as needed: libjpeg reduces it to a half,
    a quarter or an eighth while decoding, never below the working size.

    Raises Failed: empty_file, too_many_bytes, not_an_image, unsupported_format, too_many_pixels,
    too_many_scans, truncated, undecodable.
    """
    with _open(data, config) as opened:
        return _decode(opened, data, config)


def as_jpeg(data: bytes, config: ResizeConfig) -> tuple[bytes, int, int]:
    """Returns (JPEG, width, height) of an image at its own size, for one that has a label map
    already.

    The JPEG is `data` itself if that is an upright RGB or grey JPEG. Raises Failed as `decode`.
    """
    with _open(data, config) as opened:
        try:
            usable = (
                opened.format == "JPEG"
                and opened.mode in ("RGB", "L")
                and opened.getexif().get(_ORIENTATION, 1) == 1
            )
            if usable:
                pixels = decode_jpeg(data)
            else:
                pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(opened)), np.uint8)
        except Exception as error:  # noqa: BLE001 - Pillow raises many types for broken data
            raise _undecodable(error, data) from None
    height, width = pixels.shape[:2]
    return data if usable else encode_jpeg(pixels, config.jpeg_quality), width, height


def as_read(data: bytes, config: ResizeConfig) -> tuple[bytes, Image]:
    """Returns (file, pixels) of an image at its own size, upright RGB (H, W, 3) uint8, as
    diffusers' `load_image` reads it: decoded by Pillow; of transparent pixels the colour counts.

    The file is `data` if Pillow reads these pixels from it, else a PNG of them. Raises Failed as
    `decode`.
    """
    with _open(data, config) as opened:
        try:
            usable = (
                opened.format in (*_FORMATS, "MPO")  # MPO: of JPEGs with further pictures
                and opened.mode == "RGB"
                and opened.getexif().get(_ORIENTATION, 1) == 1
            )
            image = ImageOps.exif_transpose(opened).convert("RGB")
        except Exception as error:  # noqa: BLE001 - Pillow raises many types for broken data
            raise _undecodable(error, data) from None
    if not usable:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        data = file.getvalue()
    return data, np.asarray(image, np.uint8)


def _open(data: bytes, config: ResizeConfig) -> PILImage.Image:
    """Opens an image: reads and checks its header, without decoding pixels. Raises Failed."""
    if not data:
        raise Failed("empty_file", "the file has no bytes")
    if len(data) > config.max_bytes:
        raise Failed("too_many_bytes", f"{len(data):,} bytes, limit {config.max_bytes:,}")
    opener = _OPENERS.get(format_of(data), _open_common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # config.max_pixels replaces Pillow's size warning
        try:
            opened = opener(io.BytesIO(data))
        except Failed:
            raise
        except UnidentifiedImageError:
            raise _unidentified(data) from None
        except PILImage.DecompressionBombError as error:
            raise Failed("too_many_pixels", str(error)) from None
        except Exception as error:  # noqa: BLE001 - Pillow raises many types for broken data
            raise _undecodable(error, data) from None
    width, height = opened.size
    if width * height > config.max_pixels:
        raise Failed(
            "too_many_pixels", f"declares {width}×{height}, limit {config.max_pixels:,} pixels"
        )
    if opened.format in ("JPEG", "MPO") and _has_too_many_scans(data):
        raise Failed(
            "too_many_scans", f"over {_MAX_SCANS}, each over all of {width}×{height} pixels"
        )
    return opened


def _open_common(stream: io.BytesIO) -> PILImage.Image:
    PILImage.init()  # registers all readers; without it Pillow knows the common ones only
    return PILImage.open(stream, formats=_FORMATS)


def _open_avif(stream: io.BytesIO) -> PILImage.Image:
    """Raises Failed without a decoder, and libavif's own errors, which PILImage.open would hide.

    The AV1 data may be larger than the size in the header, which is the one that is checked.
    libavif decodes at most 16,384 × 16,384 pixels, and scales them to the header's size.
    """
    if not AvifImagePlugin.SUPPORTED:
        raise Failed(
            "unsupported_format",
            "an AVIF image, and this Pillow is built without AVIF. Pillow's own wheels have it: "
            "pip install --force-reinstall pillow",
        )
    return AvifImagePlugin.AvifImageFile(stream)


def _open_heif(stream: io.BytesIO) -> PILImage.Image:
    """Raises Failed without a decoder, and libheif's own errors. libheif refuses data that is
    larger than the size in the header.
    """
    try:
        import pillow_heif  # here, as it takes 30 ms and few sources have HEIF

        plugin: Callable[[io.BytesIO], PILImage.Image] = pillow_heif.HeifImageFile
        opened = plugin(stream)
    except ImportError as error:  # also while opening, if its own library can't be loaded
        raise Failed(
            "unsupported_format",
            f"a HEIF image (HEIC), and pillow-heif can't be imported ({error}): "
            "pip install pillow-heif",
        ) from None
    return opened


_OPENERS: Final[dict[str, Callable[[io.BytesIO], PILImage.Image]]] = {
    "AVIF": _open_avif,
    "HEIF": _open_heif,
}


def _upright_size(opened: PILImage.Image) -> tuple[int, int]:
    """Returns (width, height) after EXIF's orientation is applied; 5 to 8 swap them."""
    is_rotated = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (opened.height, opened.width) if is_rotated else opened.size


def _has_too_many_scans(data: bytes) -> bool:
    """True if a JPEG has more than _MAX_SCANS scans.

    Decoding a scan takes a pass over the whole image, while the scan may take a few bytes only: a
    file of a few megabytes can take an hour.
    """
    values = np.frombuffer(data, np.uint8)
    first, second = _START_OF_SCAN
    upper_bound = np.count_nonzero((values[:-1] == first) & (values[1:] == second))
    if upper_bound <= _MAX_SCANS:
        return False
    # Walk the markers: the same bytes also occur in profiles and thumbnails, and after the end.
    count, place = 0, 2
    while count <= _MAX_SCANS:
        marker = _MARKER.search(data, place)
        if marker is None or marker[0] == _END_OF_IMAGE:
            break
        count += marker[0] == _START_OF_SCAN
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        place = marker.end() + length
    return count > _MAX_SCANS


def _unidentified(data: bytes) -> Failed:
    """Returns the failure of data that Pillow doesn't recognise."""
    name = format_of(data)
    if name in READABLE:
        return Failed(
            "undecodable", f"{len(data):,} bytes of a {name} whose header is cut, broken or unknown"
        )
    if name:
        return Failed("unsupported_format", f"{name}. Convert it to JPEG or PNG")
    return Failed("not_an_image", f"begins with {data[:12]!r}")


def _decode(opened: PILImage.Image, data: bytes, config: ResizeConfig) -> Image:
    """See `decode`."""
    try:
        orientation = opened.getexif().get(_ORIENTATION, 1)
        if opened.format == "JPEG" and opened.mode == "RGB" and orientation == 1:
            return _decode_rgb_jpeg(opened, data, config)
        upright = ImageOps.exif_transpose(opened)
        return np.asarray(_to_rgb(upright), np.uint8)
    except Exception as error:  # noqa: BLE001 - Pillow raises many types for broken data
        raise _undecodable(error, data) from None


def _undecodable(error: Exception, data: bytes) -> Failed:
    """Returns the failure of a decoder's error: `truncated` if data is missing."""
    text = f"{type(error).__name__}: {error}"
    is_truncated = any(word in text.lower() for word in ("truncated", "premature", "broken"))
    if data.startswith(b"RIFF"):  # WebP: its decoder's error doesn't say, its header has the length
        is_truncated = 8 + int.from_bytes(data[4:8], "little") > len(data)
    if format_of(data) in _OPENERS:
        is_truncated = is_cut(data)
    return Failed("truncated" if is_truncated else "undecodable", text)


def _decode_rgb_jpeg(opened: PILImage.Image, data: bytes, config: ResizeConfig) -> Image:
    """Decodes with libjpeg-turbo to RGB, reduced as in `decode`; fails if data is missing."""
    min_side = max(config.size, config.min_side)
    factor = next(
        factor for factor in (8, 4, 2, 1) if factor == 1 or min(opened.size) >= factor * min_side
    )
    width, height = (-(-side // factor) for side in opened.size)
    decoded: Image = simplejpeg.decode_jpeg(
        data, colorspace="RGB", min_height=height, min_width=width, strict=True
    )
    return decoded


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16- or 32-bit: scale to 8 bits
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        scaled = (values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)
        return PILImage.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBa", "La"):  # multiplied by alpha, as HEIF may store it
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, "white")  # the background that browsers use
        return PILImage.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
