"""ArcFace identity embedding (insightface, onnxruntime) of aligned 112 × 112 crops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from configs.schema import EmbedConfig
from stages.align import ARCFACE_112, similarity_transform
from stages.backends.runtime import onnx_session
from stages.backends.weights import Weights
from stages.codec import Image
from stages.record import Face, FloatArray

CROP = 112  # pixels, side of the network's input


class ArcFace:
    def __init__(self, config: EmbedConfig, weights: Weights) -> None:
        from insightface.model_zoo.arcface_onnx import ArcFaceONNX

        path = weights.fetch(config.weights)
        self._model: Any = ArcFaceONNX(
            model_file=str(path), session=onnx_session(path, config.device)
        )

    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        """See protocols.IdentityEmbedder. The whole sequence is one batch of the network."""
        return self.embed_crops(
            [crop(image, face) for image, face in zip(images, faces, strict=True)]
        )

    def embed_crops(self, crops: Sequence[Image]) -> list[FloatArray]:
        """See protocols.IdentityEmbedder."""
        return list(np.asarray(self._model.get_feat(list(crops)), np.float32))


def crop(image: Image, face: Face) -> Image:
    """Returns the aligned face of an RGB image, BGR (112, 112, 3) uint8, as ArcFace was trained
    on.
    """
    matrix = similarity_transform(face, ARCFACE_112)
    warped = cv2.warpAffine(image, matrix, (CROP, CROP), borderValue=0.0)
    return np.ascontiguousarray(warped[:, :, ::-1], np.uint8)


def insightface_crop(image: Image, face: Face) -> Image:
    """Returns the aligned face, (112, 112, 3) uint8, in the image's order of colours.

    By insightface's own function, which computes the transform in single precision: some pixels
    differ by 1 from those of `crop`.
    """
    from insightface.utils.face_align import norm_crop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it calls what scikit-image will remove
        return np.asarray(norm_crop(image, np.array(face.landmarks, np.float32), CROP), np.uint8)
