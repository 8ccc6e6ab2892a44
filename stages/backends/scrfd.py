"""SCRFD face detection (insightface, onnxruntime): boxes, five landmarks and scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from configs.schema import DetectConfig
from stages.backends.runtime import onnx_session
from stages.backends.weights import Weights
from stages.codec import Image
from stages.record import Face


class Scrfd:
    def __init__(self, config: DetectConfig, weights: Weights) -> None:
        from insightface.model_zoo.scrfd import SCRFD

        path = weights.fetch(config.weights)
        self._model: Any = SCRFD(model_file=str(path), session=onnx_session(path, config.device))
        self._threshold = config.min_score

    def detect(self, image: Image, size: int) -> list[Face]:
        """See protocols.FaceDetector."""
        # insightface expects BGR, as OpenCV reads images, and converts it to RGB itself
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        boxes, landmarks = self._model.detect(
            bgr, input_size=(size, size), det_thresh=self._threshold
        )
        return [_face(box, points) for box, points in zip(boxes, landmarks, strict=True)]


def _face(box: Any, points: Any) -> Face:
    x1, y1, x2, y2, score = (float(value) for value in box)
    landmarks = tuple((float(x), float(y)) for x, y in points)
    return Face(box=(x1, y1, x2, y2), landmarks=landmarks, score=score)
