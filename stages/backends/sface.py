"""SFace identity embedding (OpenCV's DNN module) of aligned 112 × 112 crops: a second recogniser,
which checks what the first one says.

No data set is embedded with it, and no model is trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import cv2
import numpy as np

from stages.backends.arcface import CROP
from stages.backends.weights import Weights
from stages.codec import Image
from stages.record import FloatArray

# cosine from which two faces are taken for one person, as OpenCV's model zoo publishes it
SAME_PERSON: Final = 0.363


class SFace:
    """Embeds crops of `stages.backends.arcface.crop`, whose template is SFace's too.

    Raises WeightsError if the weights can't be fetched.
    """

    def __init__(self, weights: Weights) -> None:
        # OpenCV's own class can't load this file, which lists its weights as inputs
        self._network: Any = cv2.dnn.readNetFromONNX(str(weights.fetch("sface")))

    def embed_crops(self, crops: Sequence[Image]) -> list[FloatArray]:
        """Returns an embedding of 128 numbers and unit norm for each crop, BGR (112, 112, 3)."""
        return [self._embed(crop) for crop in crops]

    def _embed(self, crop: Image) -> FloatArray:
        blob = cv2.dnn.blobFromImage(crop, 1.0, (CROP, CROP), (0, 0, 0), swapRB=True)
        self._network.setInput(blob, "data")
        embedding = np.array(self._network.forward()[0], np.float32)
        return np.asarray(embedding / max(float(np.linalg.norm(embedding)), 1e-12), np.float32)
