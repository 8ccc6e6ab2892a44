"""Codec: JPEG and PNG bytes ⇄ pixels and label maps.

The last few decoded pictures are cached, since several stages in one process decode the same one.
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
_REMEMBERED: Final = 2**21  # pixels; of larger pictures a few would fill the memory


def encode_jpeg(image: Image, quality: int) -> bytes:
    """RGB (H, W, 3) uint8 → JPEG without chroma subsampling."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return data


def decode_jpeg(data: bytes) -> Image:
    """JPEG → RGB (H, W, 3) uint8, read-only. Raises ValueError on anything else."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return _remembered(data) if height * width <= _REMEMBERED else _decode_jpeg(data)


def _decode_jpeg(data: bytes) -> Image:
    image: Image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    image.setflags(write=False)
    return image


_remembered = lru_cache(maxsize=24)(_decode_jpeg)


def encode_labels(labels: LabelMap) -> bytes:
    """Label map (H, W) uint8 → single-channel PNG. Level 1: label maps pack well at any level."""
    done, data = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done, "OpenCV encodes any uint8 array"
    return data.tobytes()


@lru_cache(maxsize=24)
def decode_labels(data: bytes) -> LabelMap:
    """PNG → label map (H, W) uint8, read-only. Raises ValueError unless it is a single-channel
    8-bit picture.
    """
    labels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError("a label map must be a single-channel 8-bit PNG")
    labels.setflags(write=False)
    return np.asarray(labels, np.uint8)


def shrink(pixels: Image | LabelMap, long_side: int) -> Image | LabelMap:
    """Scales pixels (H, W, 3) by area, or labels (H, W) by the nearest label, to at most
    `long_side` pixels on the long side. Never enlarges.

    An image and a label map of equal size keep equal sizes, so that one can be laid over the other.
    """
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # plain NEAREST is half a pixel off
    method = cv2.INTER_AREA if pixels.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(pixels, size, interpolation=method), np.uint8)
