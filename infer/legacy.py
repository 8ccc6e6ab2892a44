"""Legacy: reads a photograph as the reference's pipelines do, for the published weights.

The data set's stages resize a photograph, pad it for the detector and correct the parser's left
and right. The reference does nothing of that, and the published weights are used with what it
makes: raw photograph, first face, label map of the parser's size. Its two pipelines differ in
detector size, order of colours and parser size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image

from configs.schema import DatasetConfig
from infer.notices import face_index
from model.spec import ModelSpec
from stages.backends.arcface import insightface_crop
from stages.backends.weights import Weights
from stages.base import Dropped, Rejection, reject
from stages.codec import encode_labels
from stages.detect import DetectStage
from stages.embed import EmbedStage, with_identity
from stages.parse import ParseStage
from stages.record import Record
from stages.resize import ResizeStage, as_read

_MIN_SCORE: Final = 0.5  # insightface's default, which the reference doesn't change


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A pipeline's way of reading. swapped: RGB goes where detector and embedder expect BGR.
    detector_size, parser_size: sides of their inputs, in pixels.
    """

    swapped: bool
    detector_size: int
    parser_size: int


# infer.py and the SD1.5 pipeline; infer_SDXL.py and the SDXL pipeline
_SD15: Final = _Reading(swapped=True, detector_size=640, parser_size=512)
_SDXL: Final = _Reading(swapped=False, detector_size=512, parser_size=1280)


_NO_FACE: Final = Dropped(
    "no_face",
    f"none over score {_MIN_SCORE} without a border around the photograph, as in the reference; a "
    "face that fills it needs one",
)


class LegacyReader:
    """Makes records of photographs as the reference's pipeline for `spec` would use them.

    config: limits on the photograph's file (`resize`), backends and weights. The published weights
    were made with buffalo_l's, det_10g and w600k_r50. Its other settings of detection, parsing and
    embedding have no effect. The constructor loads no weights. Raises ConfigError or WeightsError
    for a setting that isn't possible.
    """

    def __init__(self, spec: ModelSpec, config: DatasetConfig) -> None:
        self._reading = _SDXL if spec.two_text_encoders else _SD15
        self._limits = config.resize
        weights = Weights(config.weights)
        self._detect = DetectStage(replace(config.detect, min_score=_MIN_SCORE), weights)
        self._parse = ParseStage(
            replace(config.parse, size=self._reading.parser_size, dtype="float32"), weights
        )
        self._embed = EmbedStage(config.embed, weights)

    def set_up(self) -> None:
        """Loads the weights. Further calls have no effect."""
        for stage in (self._detect, self._parse, self._embed):
            stage.setup()

    def read(self, photo: Record, face: int = 0) -> Record:
        """Returns the record of a photograph, with image, label map and identity, or rejected with
        a reason of the data set's stages.

        photo: its `image` holds the file. face: number of the face from the left, from 1 on; 0: the
        first in the detector's order, which has the best score. The image is the photograph at its
        own size, in its own file unless that is rotated or not RGB (`stages.resize.as_read`). The
        label map has the size of the parser's input, and may lack the skin: then the reference uses
        the regions that there are.
        Without a face the record is dropped: the reference goes on with an embedding of zeros.
        Raises ConfigError if there are fewer faces than `face`.
        """
        try:
            file, pixels = as_read(photo.image, self._limits)
        except Rejection as rejection:
            return reject(photo, rejection, ResizeStage.name)
        reversed_pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        bgr, rgb = (pixels, reversed_pixels) if self._reading.swapped else (reversed_pixels, pixels)
        faces = self._detect.backend.detect(rgb, self._reading.detector_size)
        if not faces:
            return reject(photo, _NO_FACE, DetectStage.name)
        index = face_index(faces, face) if face else 0
        side = self._reading.parser_size
        squashed = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
        [labels] = self._parse.backend.parse([np.asarray(squashed)])
        [feature] = self._embed.backend.embed_crops([insightface_crop(bgr, faces[index])])
        height, width = pixels.shape[:2]
        record = replace(
            photo,
            image=file,
            width=width,
            height=height,
            source_width=width,
            source_height=height,
            faces=tuple(faces),
            face=index,
            parsing=encode_labels(labels),
        )
        return with_identity(record, feature)
