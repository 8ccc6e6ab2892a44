"""Detect: every face of the picture, and the one that the sample is about.

SCRFD at its usual 640² misses faces that fill the picture, as portraits do (IP-Adapter #281): the
picture is padded all round, and smaller detector sizes are tried before "no face" is said.
"""

from __future__ import annotations

from dataclasses import replace

import cv2

from configs.schema import DetectConfig
from stages.backends.protocols import FaceDetector
from stages.base import BackendStage, Dropped, RecordStage
from stages.codec import Image, decode_jpeg
from stages.record import Face, Record


class DetectStage(BackendStage, RecordStage):
    name = "detect"
    version = 1
    requires = ("image",)
    provides = ("faces", "face")
    config: DetectConfig

    def process_one(self, record: Record) -> Record:
        faces = find_faces(self.backend, decode_jpeg(record.image), self.config)
        if not faces:
            raise Dropped(
                "no_face",
                f"none over score {self.config.min_score} at sizes {list(self.config.scales)}",
            )
        chosen = (
            0
            if self.config.select == "first"
            else max(range(len(faces)), key=lambda i: faces[i].area)
        )
        return replace(record, faces=tuple(faces), face=chosen)


def find_faces(detector: FaceDetector, image: Image, config: DetectConfig) -> list[Face]:
    """Faces at the first of `config.scales` that has any, in coordinates of `image` (they may reach
    past its edge).
    """
    border = round(config.pad * max(image.shape[:2]))
    padded = (
        cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_CONSTANT)
        if border
        else image
    )
    for size in config.scales:
        if faces := detector.detect(padded, size):
            return [_shifted(face, -border) for face in faces]
    return []


def _shifted(face: Face, by: int) -> Face:
    x1, y1, x2, y2 = (round(value + by, 2) for value in face.box)
    landmarks = tuple((round(x + by, 2), round(y + by, 2)) for x, y in face.landmarks)
    return replace(face, box=(x1, y1, x2, y2), landmarks=landmarks)
