"""Record: what every stage takes and gives, and its flat Arrow form.

Payloads stay encoded (JPEG, PNG) and rows flat, so that Ray moves Arrow columns and never a pickle.
`image` holds the source's own bytes until the resize stage has run, and a JPEG afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.fields import Annotation, Kind, Metric, from_plain, stored, stored_fields, to_plain

KEY_LENGTH = 20
IDENTITY_DIM = 512

FloatArray = npt.NDArray[np.float32]


class Status(StrEnum):
    """`ok` goes on; `dropped` is unwanted by a rule; `failed` could not be processed."""

    OK = "ok"
    DROPPED = "dropped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """A detected face, in pixels of the record's `image`.

    landmarks: the viewer's left eye, right eye, nose tip, left and right mouth corner (the order of
    SCRFD and ArcFace).
    """

    box: tuple[float, float, float, float] = stored(
        "x1, y1, x2, y2", pa.list_(pa.float64()), length=4
    )
    landmarks: tuple[tuple[float, float], ...] = stored(
        "x, y of left eye, right eye, nose tip, left and right mouth corner",
        pa.list_(pa.float64()),
        length=10,
    )
    score: float = stored("detection score, 0 to 1", pa.float64())

    @property
    def area(self) -> float:
        x1, y1, x2, y2 = self.box
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    @property
    def side(self) -> float:
        """The short side of the box, pixels."""
        x1, y1, x2, y2 = self.box
        return min(x2 - x1, y2 - y1)


FACE_TYPE: Final = pa.struct([(name, entry.type) for name, entry in stored_fields(Face)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One photograph on its way to a sample; changed only by `dataclasses.replace` and `annotated`.

    annotations: name → plain values of what stages recorded; read one with `annotation`.
    """

    key: str = stored(
        "first 20 hex digits of sha256 of the picture's name relative to its source", pa.string()
    )
    source: str = stored("the picture's name relative to its source", pa.string())
    status: Status = stored(
        "ok (a sample), dropped (by a rule) or failed", pa.string(), json=False, default=Status.OK
    )
    reason: str = stored("why it was dropped or failed", pa.string(), json=False, default="")
    detail: str = stored(
        "what was measured or raised, for people", pa.string(), json=False, default=""
    )
    stage: str = stored("stage that dropped or failed it", pa.string(), json=False, default="")
    sha256: str = stored("digest of the source's bytes", pa.string(), default="")
    license: str = stored("licence, as the source states it", pa.string(), default="")
    author: str = stored("author, as the source states it", pa.string(), default="")
    consent: str = stored(
        "consent of the people shown, as the source states it", pa.string(), default=""
    )
    image: bytes = stored(
        "the picture: upright, RGB, resized",
        pa.large_binary(),
        member="jpg",
        json=False,
        column=False,
        default=b"",
    )
    width: int = stored("pixels of the resized picture", pa.int32(), default=0)
    height: int = stored("pixels of the resized picture", pa.int32(), default=0)
    source_width: int = stored("upright pixels of the source's picture", pa.int32(), default=0)
    source_height: int = stored("upright pixels of the source's picture", pa.int32(), default=0)
    faces: tuple[Face, ...] = stored(
        "every face found: box, five landmarks, detection score; pixels of the resized picture",
        pa.list_(FACE_TYPE),
        default=(),
    )
    face: int = stored("index of the chosen face; -1: none", pa.int32(), default=-1)
    parsing: bytes = stored(
        "label map: 8-bit grey PNG, the picture's size, 19 CelebAMask-HQ classes",
        pa.large_binary(),
        member="parsing.png",
        json=False,
        column=False,
        default=b"",
    )
    identity: FloatArray | None = stored(
        "ArcFace embedding of the chosen face: 512 numbers, float32, unit norm",
        pa.list_(pa.float32()),
        member="identity.npy",
        json=False,
        length=IDENTITY_DIM,
        default=None,
    )
    identity_norm: float | None = stored(
        "norm of the embedding before it was made 1; low where a face is hard to recognise",
        pa.float64(),
        default=None,
        metric=Metric(
            title="Embedding norm", note="before it is made unit length", group="identity"
        ),
    )
    caption: str = stored("description of the whole picture", pa.string(), member="txt", default="")
    face_caption: str = stored(
        "description of the face: face, ears, eyes, nose, mouth", pa.string(), default=""
    )
    thumbnail: bytes = stored(
        "WebP, 96 pixels on the long side", pa.binary(), json=False, default=b""
    )
    annotations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def complete(self) -> bool:
        """True if it has everything that a sample needs but captions."""
        return bool(self.image and self.parsing) and self.identity is not None

    @property
    def quarantined(self) -> bool:
        """True if a rule dropped it and it is complete: another rule may restore it without a model
        call."""
        return self.status is Status.DROPPED and self.complete

    @property
    def main_face(self) -> Face:
        """The chosen face. Raises ValueError if there is none."""
        if not 0 <= self.face < len(self.faces):
            raise ValueError(f"record {self.key} ({self.source}) has no chosen face")
        return self.faces[self.face]

    def annotation(self, kind: type[Kind]) -> Kind | None:
        """The annotation of this kind; None if no stage has recorded it."""
        values = self.annotations.get(kind.name)
        return None if values is None else from_plain(kind, values)

    def annotated(self, annotation: Annotation) -> Record:
        """This record with an annotation added, or replaced."""
        added = {annotation.name: to_plain(annotation)}
        return replace(self, annotations={**self.annotations, **added})


def scaled(face: Face, by: float) -> Face:
    """The face in a picture `by` times as large."""
    x1, y1, x2, y2 = (value * by for value in face.box)
    return Face(
        box=(x1, y1, x2, y2),
        landmarks=tuple((x * by, y * by) for x, y in face.landmarks),
        score=face.score,
    )


def key_of(source: str) -> str:
    """The record's key: the first 20 hex digits of sha256 of the source's name relative to its
    root.
    """
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:KEY_LENGTH]


ARROW_SCHEMA: Final = pa.schema(
    [
        *(pa.field(name, entry.type) for name, entry in stored_fields(Record)),
        pa.field("annotations", pa.string()),  # JSON
    ]
)


def face_to_dict(face: Face) -> dict[str, Any]:
    """JSON-ready form, landmarks flattened; the inverse of `face_from_dict`."""
    return {
        "box": list(face.box),
        "landmarks": [value for point in face.landmarks for value in point],
        "score": face.score,
    }


def face_from_dict(row: Mapping[str, Any]) -> Face:
    flat = [float(value) for value in row["landmarks"]]
    x1, y1, x2, y2 = (float(value) for value in row["box"])
    landmarks = tuple(zip(flat[::2], flat[1::2], strict=True))
    return Face(box=(x1, y1, x2, y2), landmarks=landmarks, score=row["score"])


def to_row(record: Record) -> dict[str, Any]:
    """A row of ARROW_SCHEMA, as Python values."""
    row = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    row["faces"] = [face_to_dict(face) for face in record.faces]
    row["status"] = record.status.value
    row["annotations"] = json.dumps(record.annotations)
    return row


def from_row(row: Mapping[str, Any]) -> Record:
    """The record of a row of ARROW_SCHEMA. Raises KeyError on a missing column."""
    values = {entry.name: row[entry.name] for entry in fields(Record)}
    values["faces"] = tuple(face_from_dict(face) for face in row["faces"])
    values["status"] = Status(row["status"])
    identity = row["identity"]
    values["identity"] = None if identity is None else np.asarray(identity, np.float32)
    values["annotations"] = json.loads(row["annotations"])
    return Record(**values)


def to_table(records: Iterable[Record]) -> pa.Table:
    return pa.Table.from_pylist([to_row(record) for record in records], schema=ARROW_SCHEMA)


def from_table(table: pa.Table) -> list[Record]:
    return [from_row(row) for row in table.to_pylist()]
