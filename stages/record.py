"""Record: what stages take and return, and its form as an Arrow row.

Images stay encoded (JPEG, PNG) and rows are flat, so that Ray moves Arrow columns, not pickles.
`image` holds the source's bytes until the resize stage has run, and a JPEG after that.
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
PROVENANCE: Final = ("license", "author", "consent", "person")  # fields that a source may state

FloatArray = npt.NDArray[np.float32]


class Status(StrEnum):
    """ok: goes on to the next stage; dropped: excluded by a rule; failed: can't be processed."""

    OK = "ok"
    DROPPED = "dropped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """A detected face, in pixels of the record's `image`.

    landmarks: five points (x, y): left eye, right eye, nose tip, left and right mouth corner, left
    and right as the viewer sees it (the order of SCRFD and ArcFace).
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
        """The area of the box, square pixels."""
        x1, y1, x2, y2 = self.box
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    @property
    def side(self) -> float:
        """The short side of the box, pixels."""
        x1, y1, x2, y2 = self.box
        return min(x2 - x1, y2 - y1)


EMBEDDINGS: Final = ("identity", "other_identities")  # fields of Record that hold float32 arrays
FACE_TYPE: Final = pa.struct([(name, entry.type) for name, entry in stored_fields(Face)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One input on its way through the stages. It is immutable: `dataclasses.replace` and
    `annotated` return changed copies.

    annotations: name → plain values of each annotation; `annotation` reads one.
    """

    key: str = stored(
        "first 20 hex digits of sha256 of the input's name relative to its source", pa.string()
    )
    source: str = stored("the input's name relative to its source", pa.string())
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
    person: str = stored(
        "the person shown, as the source states it; samples with equal texts are one identity",
        pa.string(),
        default="",
    )
    image: bytes = stored(
        "the image: upright, RGB, resized",
        pa.large_binary(),
        member="jpg",
        json=False,
        column=False,
        default=b"",
    )
    width: int = stored("pixels of the resized image", pa.int32(), default=0)
    height: int = stored("pixels of the resized image", pa.int32(), default=0)
    source_width: int = stored("pixels of the source's image, upright", pa.int32(), default=0)
    source_height: int = stored("pixels of the source's image, upright", pa.int32(), default=0)
    faces: tuple[Face, ...] = stored(
        "all detected faces: box, five landmarks, detection score; pixels of the resized image",
        pa.list_(FACE_TYPE),
        default=(),
    )
    face: int = stored("index of the main face; -1: none", pa.int32(), default=-1)
    parsing: bytes = stored(
        "label map: 8-bit grey PNG, of the image's size, 19 CelebAMask-HQ classes",
        pa.large_binary(),
        member="parsing.png",
        json=False,
        column=False,
        default=b"",
    )
    identity: FloatArray | None = stored(
        "ArcFace embedding of the main face: 512 numbers, float32, unit norm",
        pa.list_(pa.float32()),
        member="identity.npy",
        json=False,
        length=IDENTITY_DIM,
        default=None,
    )
    identity_norm: float | None = stored(
        "norm of the embedding before scaling; low where a face is hard to recognise",
        pa.float64(),
        default=None,
        metric=Metric(title="Embedding norm", note="before scaling", group="identity"),
    )
    other_identities: FloatArray | None = stored(
        "embeddings of the other faces, 512 numbers each, in the order of `faces` without the main "
        "one; zeros where the network gave none; null: not computed",
        pa.list_(pa.float32()),
        json=False,
        default=None,
    )
    caption: str = stored("description of the whole image", pa.string(), member="txt", default="")
    face_caption: str = stored(
        "description of the face: face, ears, eyes, nose, mouth", pa.string(), default=""
    )
    thumbnail: bytes = stored(
        "WebP, 96 pixels on the long side", pa.binary(), json=False, default=b""
    )
    annotations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if it is neither dropped nor failed."""
        return self.status is Status.OK

    @property
    def complete(self) -> bool:
        """True if it has all that a sample needs except captions."""
        return bool(self.image and self.parsing) and self.identity is not None

    @property
    def quarantined(self) -> bool:
        """True if it was dropped and is complete: changed rules can restore it without a model
        call.
        """
        return self.status is Status.DROPPED and self.complete

    @property
    def main_face(self) -> Face:
        """The main face. Raises ValueError if there is none."""
        if not 0 <= self.face < len(self.faces):
            raise ValueError(f"record {self.key} ({self.source}) has no chosen face")
        return self.faces[self.face]

    @property
    def other_faces(self) -> tuple[Face, ...]:
        """All detected faces except the main one, in order."""
        return tuple(face for index, face in enumerate(self.faces) if index != self.face)

    def annotation(self, kind: type[Kind]) -> Kind | None:
        """Returns the annotation of this class; None if no stage has recorded it."""
        values = self.annotations.get(kind.name)
        return None if values is None else from_plain(kind, values)

    def annotated(self, annotation: Annotation) -> Record:
        """Returns this record with the annotation added; it replaces one of the same name."""
        added = {annotation.name: to_plain(annotation)}
        return replace(self, annotations={**self.annotations, **added})


def scaled(face: Face, by: float) -> Face:
    """Returns the face in pixels of an image whose sides are `by` times as long."""
    x1, y1, x2, y2 = (value * by for value in face.box)
    return Face(
        box=(x1, y1, x2, y2),
        landmarks=tuple((x * by, y * by) for x, y in face.landmarks),
        score=face.score,
    )


def key_of(source: str) -> str:
    """Returns the key of the input with this name: the first 20 hex digits of the name's sha256."""
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:KEY_LENGTH]


ARROW_SCHEMA: Final = pa.schema(
    [
        *(pa.field(name, entry.type) for name, entry in stored_fields(Record)),
        pa.field("annotations", pa.string()),  # JSON
    ]
)


def face_to_dict(face: Face) -> dict[str, Any]:
    """Returns the face as JSON-ready values; landmarks become a list of ten numbers."""
    return {
        "box": list(face.box),
        "landmarks": [value for point in face.landmarks for value in point],
        "score": face.score,
    }


def face_from_dict(row: Mapping[str, Any]) -> Face:
    """Returns the face of a mapping that `face_to_dict` made."""
    flat = [float(value) for value in row["landmarks"]]
    x1, y1, x2, y2 = (float(value) for value in row["box"])
    landmarks = tuple(zip(flat[::2], flat[1::2], strict=True))
    return Face(box=(x1, y1, x2, y2), landmarks=landmarks, score=row["score"])


def to_row(record: Record) -> dict[str, Any]:
    """Returns the record as a row of ARROW_SCHEMA, in Python values."""
    row = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    row["faces"] = [face_to_dict(face) for face in record.faces]
    row["status"] = record.status.value
    row["annotations"] = json.dumps(record.annotations)
    return row


def from_row(row: Mapping[str, Any]) -> Record:
    """Returns the record of a row of ARROW_SCHEMA. Raises KeyError if a column is missing."""
    values = {entry.name: row[entry.name] for entry in fields(Record)}
    values["faces"] = tuple(face_from_dict(face) for face in row["faces"])
    values["status"] = Status(row["status"])
    for name in EMBEDDINGS:
        values[name] = None if row[name] is None else np.asarray(row[name], np.float32)
    values["annotations"] = json.loads(row["annotations"])
    return Record(**values)


def to_table(records: Iterable[Record]) -> pa.Table:
    """Returns a table of ARROW_SCHEMA, with a row for each record."""
    return pa.Table.from_pylist([to_row(record) for record in records], schema=ARROW_SCHEMA)


def from_table(table: pa.Table) -> list[Record]:
    """Returns the records of a table of ARROW_SCHEMA."""
    return [from_row(row) for row in table.to_pylist()]
