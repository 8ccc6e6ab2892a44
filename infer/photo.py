"""Reading a photograph of a person: the stages of the data set pipeline, applied to one image."""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from configs.errors import FaceError, SourceError
from configs.schema import DatasetConfig
from infer.legacy import LegacyReader
from infer.notices import face_index, face_notice
from model.spec import ModelSpec
from stages.backends.weights import Weights
from stages.base import Dropped, Stage, reject, run_chain
from stages.chain import build_stages
from stages.detect import DetectStage
from stages.record import Record, Status, key_of
from stages.regions import Mode

logger = logging.getLogger("consistentid")

# A path, an encoded file, an image, RGB (H, W, 3) uint8, or a record before the stages.
Photo = str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | Record

# A record's reason → the error message. Other reasons concern the file, not the face.
_FACE_REASONS: Final = {
    "no_face": "no face found in {photo}",
    "no_face_parsed": "no face found in {photo}: a face was detected, but no facial skin in it",
    "face_too_small": "the face in {photo} is too small",
    "no_identity": "the face in {photo} could not be recognised",
}
_PNG_MODES: Final = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # that a PNG file can have
_MIN_FACE: Final = 32  # short side of the face's box, in pixels of the resized image
_FACE_ADVICE: Final = (
    "Give a photograph that shows one face, from the front and at least 100 pixels wide."
)
_FILE_ADVICE: Final = "Give a JPEG, PNG, WebP, AVIF or HEIC photograph that opens in a viewer."


class PhotoReader:
    """Reads people from photographs for a model.

    config: of the stages, which should be that of the adapter's training data. Their weights are
    loaded at the first use, because saved identities don't need them. In legacy mode photographs
    are read as the reference does, see `infer.legacy`.
    """

    def __init__(self, config: DatasetConfig, spec: ModelSpec, mode: Mode) -> None:
        self.config, self._spec, self._mode = config, spec, mode
        self._legacy = LegacyReader(spec, config) if mode == "legacy" else None
        self._stages: list[Stage] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes copies and pickles without weights, which are loaded at the first use."""
        return PhotoReader, (self.config, self._spec, self._mode)

    @property
    def embedder(self) -> str:
        """sha256 of the weights that make the embeddings."""
        return Weights(self.config.weights).digest(self.config.embed.weights)

    def read(self, photo: Photo, name: str = "", face: int = 0) -> Record:
        """Returns the record of the person in a photograph.

        A record that has been through the stages, e.g. one of a shard, is returned as it is. name:
        of the photograph in error messages. face: number of the person from the left, from 1 on; 0:
        the largest face, in legacy mode the detector's first. If there are several faces, it is
        logged which was taken. Raises FaceError if there is no usable face, SourceError if the
        photograph isn't a readable image, ConfigError if there are fewer faces than `face`.
        """
        record = as_record(photo)
        if record.ok and record.complete:
            return record
        shown = name or shown_name(photo)
        record = self._read(record, face)
        if not record.ok:
            raise _error_for(record, shown)
        if notice := face_notice(record.faces, record.face):
            logger.warning("%s: %s", shown, notice)
        return record

    def _read(self, record: Record, face: int) -> Record:
        if self._legacy is not None:
            self._legacy.set_up()
            return self._legacy.read(record, face)
        if self._stages is None:
            self._stages = set_up_stages(self.config)
        end = 1 + [stage.name for stage in self._stages].index(DetectStage.name)
        [record] = run_chain(self._stages[:end], [record])
        if record.ok and face:
            record = replace(record, face=face_index(record.faces, face))
        [record] = run_chain(self._stages[end:], [record])
        return _without_small_face(record)


def shown_name(photo: Photo) -> str:
    """Returns the name of a photograph for messages: its path, or where its record came from."""
    if isinstance(photo, Record):
        return photo.source
    return str(photo) if isinstance(photo, str | Path) else "the photograph"


def as_record(photo: Photo) -> Record:
    """Returns the record of a photograph before the stages. Raises SourceError as `read_photo`."""
    if isinstance(photo, Record):
        return photo
    if isinstance(photo, str | Path):
        return read_photo(photo)
    if isinstance(photo, bytes):
        return photo_record(photo, "photograph")
    try:
        if isinstance(photo, np.ndarray):
            image = _image_of(photo)
        elif isinstance(photo, Image.Image):
            image = ImageOps.exif_transpose(photo)  # which the file's reader does too
        else:
            raise TypeError(f"it is of type {type(photo).__name__}")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if image.mode not in _PNG_MODES:
            image = image.convert("I;16" if image.mode == "I" else "RGB")
        with io.BytesIO() as file:
            image.save(file, "PNG")
            return photo_record(file.getvalue(), "photograph")
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            f"the photograph can't be used: {error}. Give a path, a file's bytes, an image of "
            "Pillow, or an array (H, W, 3) of uint8."
        ) from error


def _image_of(array: npt.NDArray[Any]) -> Image.Image:
    """Returns the image of an array (H, W, 3) of uint8; (H, W) is grey, a fourth channel alpha."""
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"it is an array of shape {array.shape} and type {array.dtype}")
    return Image.fromarray(array)


def read_photo(path: str | Path) -> Record:
    """Reads a photograph and returns its record before the stages; its source is the file's name.

    Raises SourceError for a path that doesn't exist, isn't a regular file, or can't be read.
    """
    photo = Path(path)
    if photo.is_dir():
        raise SourceError(f"{photo} is a folder; expected one photograph. Name a file in it.")
    if not photo.exists():
        raise SourceError(
            f"no photograph at {photo}. Check the path; it is relative to the current folder."
        )
    if not photo.is_file():
        raise SourceError(f"{photo} is not a regular file; expected a photograph. Name another.")
    try:
        data = photo.read_bytes()
    except OSError as error:
        raise SourceError(
            f"{photo} can't be read: {error.strerror or error}. Check its permissions."
        ) from error
    return photo_record(data, photo.name)


def photo_record(data: bytes, name: str) -> Record:
    """Returns the record of a photograph before the stages.

    data: the file's bytes. name: the record's source, from which its key is made.
    """
    return Record(
        key=key_of(name), source=name, sha256=hashlib.sha256(data).hexdigest(), image=data
    )


def set_up_stages(config: DatasetConfig) -> list[Stage]:
    """Builds the data set's stages, in order, and loads their weights."""
    stages = build_stages(config)
    for stage in stages:
        stage.setup()
    return stages


def _without_small_face(record: Record) -> Record:
    """Returns the record, dropped if its face is too small to be recognised."""
    if not record.ok or record.main_face.side >= _MIN_FACE:
        return record
    detail = f"{record.main_face.side:.0f} pixels wide, expected at least {_MIN_FACE}"
    return reject(record, Dropped("face_too_small", detail), "detect")


def _error_for(record: Record, photo: str) -> FaceError | SourceError:
    """Returns the error that explains why a record was dropped or failed."""
    detail = f" ({record.detail})" if record.detail else ""
    if record.reason in _FACE_REASONS:
        return FaceError(
            f"{_FACE_REASONS[record.reason].format(photo=photo)}{detail}. {_FACE_ADVICE}"
        )
    if record.reason == "not_an_image":
        return SourceError(f"{photo} is not an image{detail}. {_FILE_ADVICE}")
    outcome = "was rejected" if record.status is Status.DROPPED else "could not be read"
    reason = record.reason.replace("_", " ")
    return SourceError(
        f"{photo} {outcome} in stage {record.stage!r}: {reason}{detail}. {_FILE_ADVICE}"
    )
