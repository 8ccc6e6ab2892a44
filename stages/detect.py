"""Detect: finds all faces of an image and chooses the sample's main face.

SCRFD at its usual input of 640 × 640 misses faces that fill the image, as in portraits (issue 81 of
IP-Adapter). So the image is padded on all sides, and smaller detector sizes are tried before the
record is dropped.
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
        main_face = 0
        if self.config.select == "largest":
            main_face = max(range(len(faces)), key=lambda i: faces[i].area)
        return replace(record, faces=tuple(faces), face=main_face)


def find_faces(detector: FaceDetector, image: Image, config: DetectConfig) -> list[Face]:
    """Returns the faces detected at the first of `config.scales` that detects any, in pixels of
    `image`, rounded to 0.01, with scores rounded to 0.0001; boxes may extend beyond its edges.
    """
    border = round(config.pad * max(image.shape[:2]))
    padded = image
    if border:
        padded = cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_CONSTANT)
    for size in config.scales:
        if faces := detector.detect(padded, size):
            return [_rounded(face, -border) for face in faces]
    return []


def _rounded(face: Face, offset: int) -> Face:
    """Returns the face, rounded and shifted by `offset` pixels."""

    def place(value: float) -> float:
        return round(round(value, 2) + offset, 2)

    x1, y1, x2, y2 = (place(value) for value in face.box)
    return Face(
        box=(x1, y1, x2, y2),
        landmarks=tuple((place(x), place(y)) for x, y in face.landmarks),
        score=round(face.score, 4),
    )
