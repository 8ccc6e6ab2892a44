"""Photographs of a person, embedded by the data set's own stages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from configs.errors import FaceError, SourceError
from configs.schema import DatasetConfig
from stages.base import run_chain
from stages.chain import build_stages
from stages.record import FloatArray, Record, key_of

_STAGES: Final = ("resize", "detect", "embed")


class EmbeddedPhotos(NamedTuple):
    """vectors: float32 (Q, 512), unit norm, of the largest face in each of Q photographs. embedder:
    signature of the stage `embed`.
    """

    vectors: FloatArray
    embedder: str


def embed_photos(config: DatasetConfig, photos: Sequence[Path]) -> EmbeddedPhotos:
    """Returns the embeddings of photographs of a person.

    Raises SourceError for a missing photograph, FaceError for one without a usable face.
    """
    vectors = []
    for photo, record in zip(photos, photo_records(config, photos), strict=True):
        if not record.ok or record.identity is None:
            raise FaceError(
                f"{photo}: {record.reason.replace('_', ' ')} ({record.detail}). Give a photograph "
                "that shows the person's face from the front."
            )
        vectors.append(record.identity)
    [embedder] = [stage.signature() for stage in build_stages(config) if stage.name == "embed"]
    return EmbeddedPhotos(np.stack(vectors), embedder)


def photo_records(config: DatasetConfig, photos: Sequence[Path]) -> list[Record]:
    """Returns the records of photographs after resize, detect and embed, in order. Their main face
    is the largest. Raises SourceError for a file that isn't there or can't be read.
    """
    config = replace(config, detect=replace(config.detect, select="largest"))
    return run_chain(
        [stage for stage in build_stages(config) if stage.name in _STAGES],
        [_read(photo) for photo in photos],
    )


def _read(photo: Path) -> Record:
    if not photo.is_file():
        raise SourceError(f"no photograph at {photo}. Give the path of an image of the person.")
    try:
        data = photo.read_bytes()
    except OSError as error:
        raise SourceError(f"{photo} can't be read: {error.strerror}.") from error
    digest = hashlib.sha256(data).hexdigest()
    return Record(key=key_of(str(photo)), source=photo.name, image=data, sha256=digest)
