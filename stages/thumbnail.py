"""Thumbnail: makes a small WebP of the image, for the sidecar and the report.

It is made directly after the image has been decoded and stays in a record that is dropped later, so
that the report can show it.
"""

from __future__ import annotations

from dataclasses import replace

import cv2

from configs.quality import ThumbnailConfig
from stages.base import RecordStage
from stages.codec import THUMBNAIL_SIDE, decode_jpeg, shrink
from stages.record import Record


class ThumbnailStage(RecordStage):
    name = "thumbnail"
    version = 1
    requires = ("image",)
    provides = ("thumbnail",)
    config: ThumbnailConfig

    def process_one(self, record: Record) -> Record:
        small = shrink(decode_jpeg(record.image), THUMBNAIL_SIDE)
        success, data = cv2.imencode(
            ".webp", small[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, self.config.quality]
        )
        assert success, "OpenCV encodes any uint8 image"
        return replace(record, thumbnail=data.tobytes())
