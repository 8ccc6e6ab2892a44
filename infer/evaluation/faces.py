"""What the data set pipeline's models say of a picture: its face, its parts, and who is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import cv2
import numpy as np

from configs.schema import DatasetConfig
from stages.backends.appearance import Appearance, measure_appearance
from stages.backends.arcface import crop
from stages.backends.registry import backend_class
from stages.backends.sface import SFace
from stages.backends.weights import Weights
from stages.codec import Image, LabelMap, decode_jpeg, decode_labels
from stages.detect import find_faces
from stages.measurements import angles_of, rotation_of
from stages.record import Face, FloatArray, Record

# arcface: the embedder of the data set, which the adapter is trained with; sface: one that no model
# is trained with.
Recogniser = Literal["arcface", "sface"]
RECOGNISERS: Final[tuple[Recogniser, ...]] = get_args(Recogniser)

_SHORT_SIDE: Final = 256  # pixels, to which smaller pictures are enlarged
_BATCH: Final = 8  # label maps computed together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredFace:
    """The largest face of a picture.

    face: in pixels of the measured picture. labels: its label map (H, W). embeddings: (512,) and
    (128,), unit norm. appearance: see `stages.backends.appearance`. yaw, pitch: in degrees.
    """

    face: Face
    labels: LabelMap
    embeddings: dict[Recogniser, FloatArray]
    appearance: Appearance
    yaw: float
    pitch: float

    @property
    def has_parts(self) -> bool:
        """Whether eyes, nose and mouth are in the label map, near the face. Glasses count as eyes,
        which the parser labels as glasses too.
        """
        seen = self.appearance
        return {"nose", "mouth"} <= seen.regions and ("eyes" in seen.regions or seen.glasses)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredPicture:
    """A picture, RGB (H, W, 3), and its largest face; None if none was detected.

    faces: how many were detected.
    """

    picture: Image
    face: MeasuredFace | None
    faces: int


class FaceMeasurer:
    """Measures pictures with the models of a data set's configuration, which are loaded once.

    Raises WeightsError if weights can't be fetched.
    """

    def __init__(self, config: DatasetConfig | None = None) -> None:
        self._config = config or DatasetConfig()
        weights = Weights(self._config.weights)

        def backend(job: str, settings: Any) -> Any:
            return backend_class(job, settings.backend)(settings, weights)

        self._detector = backend("detect", self._config.detect)
        self._parser = backend("parse", self._config.parse)
        self._embedder = backend("embed", self._config.embed)
        self._sface = SFace(weights)

    def pictures(self, pictures: Sequence[Image]) -> list[MeasuredPicture]:
        """Measures pictures, RGB (H, W, 3) uint8.

        Small ones are enlarged first, and what is measured is in pixels of the enlarged ones.
        """
        large = [enlarged(picture) for picture in pictures]
        faces = [find_faces(self._detector, each, self._config.detect) for each in large]
        rows = [row for row, own in enumerate(faces) if own]
        largest = [(large[row], max(faces[row], key=lambda face: face.area)) for row in rows]
        measured = dict(zip(rows, self._measure(largest), strict=True))
        return [
            MeasuredPicture(picture=picture, face=measured.get(row), faces=len(faces[row]))
            for row, picture in enumerate(large)
        ]

    def by_person(
        self, pictures: Mapping[str, Sequence[Image]]
    ) -> dict[str, list[MeasuredPicture]]:
        """Measures the pictures of people, by name."""
        return {name: self.pictures(own) for name, own in pictures.items()}

    def records(self, records: Sequence[Record]) -> list[MeasuredPicture]:
        """Returns what the pipeline has measured of samples, with the embedding of SFace."""
        return [self._record(record) for record in records]

    def _measure(self, faces: Sequence[tuple[Image, Face]]) -> list[MeasuredFace]:
        measured = []
        for start in range(0, len(faces), _BATCH):
            batch = faces[start : start + _BATCH]
            labels = self._parser.parse([picture for picture, _ in batch])
            crops = [crop(picture, face) for picture, face in batch]
            arcface, sface = self._embedder.embed_crops(crops), self._sface.embed_crops(crops)
            for row, (picture, face) in enumerate(batch):
                measured.append(_measured(picture, face, labels[row], arcface[row], sface[row]))
        return measured

    def _record(self, record: Record) -> MeasuredPicture:
        picture, face = decode_jpeg(record.image), record.main_face
        assert record.identity is not None, "a sample has an embedding"
        [sface] = self._sface.embed_crops([crop(picture, face)])
        labels = decode_labels(record.parsing)
        measured = _measured(picture, face, labels, record.identity, sface)
        return MeasuredPicture(picture=picture, face=measured, faces=len(record.faces))


def enlarged(picture: Image) -> Image:
    """Returns the picture, enlarged to a short side of 256 pixels if it is smaller."""
    height, width = picture.shape[:2]
    scale = _SHORT_SIDE / min(height, width)
    if scale <= 1:
        return picture
    size = (round(width * scale), round(height * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def _measured(
    picture: Image, face: Face, labels: LabelMap, arcface: FloatArray, sface: FloatArray
) -> MeasuredFace:
    yaw, pitch, _ = angles_of(rotation_of(face))
    return MeasuredFace(
        face=face,
        labels=labels,
        embeddings={"arcface": _unit(arcface), "sface": _unit(sface)},
        appearance=measure_appearance(picture, labels, face),
        yaw=yaw,
        pitch=pitch,
    )


def _unit(embedding: FloatArray) -> FloatArray:
    return np.asarray(embedding / max(float(np.linalg.norm(embedding)), 1e-12), np.float32)
