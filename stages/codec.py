"""Codec: encodes images as JPEG and label maps as PNG, and decodes them.

The last few decoded images are cached, since several stages of one process decode the same image.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

Image = npt.NDArray[np.uint8]  # RGB (H, W, 3)
LabelMap = npt.NDArray[np.uint8]  # (H, W)

THUMBNAIL_SIDE: Final = 96  # pixels
_CACHED_PIXELS: Final = 2**21  # larger images are not cached: a few would fill the memory


def encode_jpeg(image: Image, quality: int) -> bytes:
    """Returns RGB (H, W, 3) uint8 as a JPEG without chroma subsampling. quality: 1 to 100."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return data


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Returns a JPEG's (height, width) without decoding it. Raises ValueError for other data."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return height, width


def decode_jpeg(data: bytes) -> Image:
    """Returns a JPEG as RGB (H, W, 3) uint8, read-only. Raises ValueError for other data."""
    height, width = jpeg_size(data)
    return _decode_cached(data) if height * width <= _CACHED_PIXELS else _decode_jpeg(data)


def _decode_jpeg(data: bytes) -> Image:
    image: Image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    image.setflags(write=False)
    return image


_decode_cached = lru_cache(maxsize=24)(_decode_jpeg)


def encode_labels(labels: LabelMap) -> bytes:
    """Returns a label map (H, W) uint8 as a single-channel PNG."""
    # level 1 is fast; higher levels hardly make label maps smaller
    encoded, data = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert encoded, "OpenCV encodes any uint8 array"
    return data.tobytes()


@lru_cache(maxsize=24)
def decode_labels(data: bytes) -> LabelMap:
    """Returns a PNG as a label map (H, W) uint8, read-only. Raises ValueError unless it is a
    single-channel 8-bit image.
    """
    labels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError("a label map must be a single-channel 8-bit PNG")
    labels.setflags(write=False)
    return np.asarray(labels, np.uint8)


def shrink(pixels: Image | LabelMap, long_side: int) -> Image | LabelMap:
    """Scales pixels (H, W, 3) by area, or labels (H, W) by the nearest label, to at most
    `long_side` pixels on the long side. Never enlarges.

    An image and a label map of equal size get equal sizes, so that one can be drawn over the other.
    """
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # INTER_NEAREST is off by half a pixel
    method = cv2.INTER_AREA if pixels.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(pixels, size, interpolation=method), np.uint8)
