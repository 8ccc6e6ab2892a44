"""Resize: any photograph → an upright RGB JPEG of the working size.

The size a header declares is checked before a pixel is decoded, and so is the number of a JPEG's
scans: a bomb costs nothing. EXIF orientation is applied, CMYK, 16-bit, palette and alpha pictures
become plain RGB, an animation its first frame.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from typing import Final

import cv2
import numpy as np
import simplejpeg
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from configs.schema import ResizeConfig
from stages.base import Dropped, Failed, RecordStage
from stages.codec import Image, decode_jpeg, encode_jpeg
from stages.record import Record

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_BEGINNINGS: Final = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_MOST_SCANS: Final = 500  # libjpeg-turbo's own limit, where it has one; honest files hold about ten
# of a JPEG: what begins or ends a scan
_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_SCAN, _END = b"\xff\xda", b"\xff\xd9"


class ResizeStage(RecordStage):
    name = "resize"
    version = 4
    requires = ("image",)
    provides = ("image", "width", "height", "source_width", "source_height")
    config: ResizeConfig

    def process_one(self, record: Record) -> Record:
        with _opened(record.image, self.config) as opened:
            pixels = self._resized(_pixels(opened, record.image, self.config))
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

    def _resized(self, image: Image) -> Image:
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
        shrinks = target[0] * target[1] < width * height
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(image, target, interpolation=method), np.uint8)


def decode(data: bytes, config: ResizeConfig) -> Image:
    """Encoded picture → upright RGB (H, W, 3) uint8, at full size or, for a JPEG at least twice as
    large as needed, at half, a quarter or an eighth of it: libjpeg's own reduction while it
    decodes, never to under the working size.

    Raises Failed: empty_file, too_many_bytes, not_an_image, too_many_pixels, too_many_scans,
    truncated, undecodable.
    """
    with _opened(data, config) as opened:
        return _pixels(opened, data, config)


def as_jpeg(data: bytes, config: ResizeConfig) -> tuple[bytes, int, int]:
    """(JPEG, width, height) of a picture at its own size, for one whose label map is there already.

    Its own bytes where they are an upright RGB or grey JPEG, else encoded once. Raises Failed as
    `decode`.
    """
    with _opened(data, config) as opened:
        try:
            plain = (
                opened.format == "JPEG"
                and opened.mode in ("RGB", "L")
                and opened.getexif().get(0x0112, 1) == 1
            )
            pixels = (
                decode_jpeg(data)
                if plain
                else np.asarray(_to_rgb(ImageOps.exif_transpose(opened)), np.uint8)
            )
        except Exception as error:  # noqa: BLE001 - as below
            raise _undecodable(error, data) from None
    height, width = pixels.shape[:2]
    return data if plain else encode_jpeg(pixels, config.jpeg_quality), width, height


def _opened(data: bytes, config: ResizeConfig) -> PILImage.Image:
    """The picture, its header read and checked, not a pixel decoded."""
    if not data:
        raise Failed("empty_file", "the file has no bytes")
    if len(data) > config.max_bytes:
        raise Failed("too_many_bytes", f"{len(data):,} bytes, limit {config.max_bytes:,}")
    PILImage.init()  # every reader of _FORMATS: Pillow loads only the commonest by itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit stands in place of Pillow's warning
        try:
            opened = PILImage.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            raise _unidentified(data) from None
        except PILImage.DecompressionBombError as error:
            raise Failed("too_many_pixels", str(error)) from None
        except Exception as error:  # noqa: BLE001 - Pillow's readers raise whatever a broken header provokes
            raise _undecodable(error, data) from None
    width, height = opened.size
    if width * height > config.max_pixels:
        raise Failed(
            "too_many_pixels", f"declares {width}×{height}, limit {config.max_pixels:,} pixels"
        )
    if opened.format in ("JPEG", "MPO") and _too_many_scans(data):
        raise Failed(
            "too_many_scans", f"over {_MOST_SCANS}, each over all of {width}×{height} pixels"
        )
    return opened


def _upright_size(opened: PILImage.Image) -> tuple[int, int]:
    """(width, height) of a picture that has been decoded, once EXIF's orientation is applied: from
    5 on it lies.
    """
    lies = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (opened.height, opened.width) if lies else opened.size


def _too_many_scans(data: bytes) -> bool:
    """True if a JPEG holds more than _MOST_SCANS scans.

    Each costs a pass over the whole picture and may take next to no bytes: an hour of work fits
    into a few megabytes.
    """
    values = np.frombuffer(data, np.uint8)
    at_most = np.count_nonzero((values[:-1] == _SCAN[0]) & (values[1:] == _SCAN[1]))
    if at_most <= _MOST_SCANS:
        return False
    # what looks like a scan may lie in a profile or a thumbnail, or behind the end
    count, place = 0, 2
    while count <= _MOST_SCANS and (found := _MARKER.search(data, place)) and found[0] != _END:
        count += found[0] == _SCAN
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return count > _MOST_SCANS


def _unidentified(data: bytes) -> Failed:
    kind = next((kind for beginning, kind in _BEGINNINGS.items() if data.startswith(beginning)), "")
    if kind:
        return Failed(
            "undecodable", f"{len(data):,} bytes of a {kind} whose header is cut, broken or unknown"
        )
    return Failed("not_an_image", f"begins with {data[:12]!r}")


def _pixels(opened: PILImage.Image, data: bytes, config: ResizeConfig) -> Image:
    try:
        orientation = opened.getexif().get(0x0112, 1)
        if opened.format == "JPEG" and opened.mode == "RGB" and orientation == 1:
            return _fast_jpeg(opened, data, config)
        upright = ImageOps.exif_transpose(opened)
        return np.asarray(_to_rgb(upright), np.uint8)
    except Exception as error:  # noqa: BLE001 - as above
        raise _undecodable(error, data) from None


def _undecodable(error: Exception, data: bytes) -> Failed:
    text = f"{type(error).__name__}: {error}"
    cut = any(word in text.lower() for word in ("truncated", "premature", "broken"))
    if data.startswith(b"RIFF"):  # a WebP, whose decoder doesn't say; it begins with its length
        cut = 8 + int.from_bytes(data[4:8], "little") > len(data)
    return Failed("truncated" if cut else "undecodable", text)


def _fast_jpeg(opened: PILImage.Image, data: bytes, config: ResizeConfig) -> Image:
    """libjpeg-turbo, straight to RGB, strict about missing data."""
    least = max(config.size, config.min_side)
    factor = next(
        factor for factor in (8, 4, 2, 1) if factor == 1 or min(opened.size) >= factor * least
    )
    width, height = (-(-side // factor) for side in opened.size)
    decoded: Image = simplejpeg.decode_jpeg(
        data, colorspace="RGB", min_height=height, min_width=width, strict=True
    )
    return decoded


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16- and 32-bit: keep the high byte
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return PILImage.fromarray(
            (values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)
        ).convert("RGB")
    # on white, as a browser shows it
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba).convert(
            "RGB"
        )
    return image.convert("RGB")
