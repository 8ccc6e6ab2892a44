"""What a stage asks of a model. Images are RGB uint8 (H, W, 3), coordinates pixels of that image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stages.record import Face, FloatArray, Record

Image = npt.NDArray[np.uint8]
LabelMap = npt.NDArray[np.uint8]


class FaceDetector(Protocol):
    def detect(self, image: Image, size: int) -> list[Face]:
        """All faces at detector input size `size`², best score first, coordinates of `image`."""
        ...


class FaceParser(Protocol):
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        """CelebAMask-HQ labels 0-18, each map (h, w) of its image's own size."""
        ...


class IdentityEmbedder(Protocol):
    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        """float32[512] per image, of the face given for it, as the network gives it: not yet of unit norm."""
        ...


class Captioner(Protocol):
    def caption(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """(coarse, fine) description of each record, from its image and what was measured of it."""
        ...
