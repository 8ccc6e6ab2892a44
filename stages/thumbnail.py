"""Thumbnail: the picture at a glance, small enough to stand in the sidecar and, by thousands, in
the report.

It is made as soon as there is a picture, and stays with a record that is dropped later: the report
shows what was lost.
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
        done, data = cv2.imencode(
            ".webp", small[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, self.config.quality]
        )
        assert done, "OpenCV encodes any uint8 picture"
        return replace(record, thumbnail=data.tobytes())
