"""Thumbnail: makes a small WebP of the image, for the sidecar and the report.

It is made directly after the image has been decoded and stays in a record that is dropped later, so
that the report can show it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import cv2
import numpy as np

from configs.quality import ThumbnailConfig
from stages.backends.protocols import Image, LabelMap
from stages.base import RecordStage
from stages.codec import decode_jpeg
from stages.record import Record

LONG_SIDE: Final = 96  # pixels


class ThumbnailStage(RecordStage):
    name = "thumbnail"
    version = 1
    requires = ("image",)
    provides = ("thumbnail",)
    config: ThumbnailConfig

    def process_one(self, record: Record) -> Record:
        small = shrink(decode_jpeg(record.image), LONG_SIDE)
        success, data = cv2.imencode(
            ".webp", small[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, self.config.quality]
        )
        assert success, "OpenCV encodes any uint8 image"
        return replace(record, thumbnail=data.tobytes())


def shrink(pixels: Image | LabelMap, long_side: int) -> Image | LabelMap:
    """Pixels (H, W, 3) by area, or labels (H, W) by the nearest, at most `long_side` on the long
    side; never larger.

    A picture and its label map become equally large, so that one lies on the other.
    """
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # plain NEAREST is half a pixel off
    method = cv2.INTER_AREA if pixels.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(pixels, size, interpolation=method), np.uint8)
