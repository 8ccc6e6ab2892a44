"""Record: what every stage takes and gives, and its flat Arrow form.

Payloads stay encoded (JPEG, PNG) and rows flat, so the engine moves Arrow columns and never a
pickle. `image` holds the source's own bytes until the resize stage has run, and a JPEG afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 2
KEY_LENGTH = 20
IDENTITY_DIM = 512

FloatArray = npt.NDArray[np.float32]


class Status(StrEnum):
    """`ok` goes on; `dropped` was judged unfit by a rule; `failed` could not be processed."""

    OK = "ok"
    DROPPED = "dropped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """A detected face, in pixels of the record's `image`.

    box: (x1, y1, x2, y2). landmarks: five (x, y): the viewer's left eye, right eye, nose tip, left
    and right mouth corner (the order of SCRFD and ArcFace). score: in [0, 1].
    """

    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    score: float

    @property
    def area(self) -> float:
        x1, y1, x2, y2 = self.box
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    @property
    def side(self) -> float:
        """The short side of the box, pixels."""
        x1, y1, x2, y2 = self.box
        return min(x2 - x1, y2 - y1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What the quality rules judge by: all of the chosen face, but for `hash`, which is of the
    whole picture. See stages/measurements.py for how each is measured.
    """

    sharpness: float  # 0..1: 0 is blurred
    brightness: float  # mean luma of the face's skin, 0..1
    clipped: float  # share of the face's pixels at 0-2 or 253-255 luma, 0..1
    yaw: float  # degrees, 0 is frontal; > 0: turned to the viewer's right
    pitch: float  # > 0: raised
    roll: float  # > 0: tilted clockwise as the viewer sees it
    occlusion: float  # share of the face's expected area that something else covers, 0..1
    hash: str  # 64 hex digits: 256-bit DCT perceptual hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What the trainer's own prompt code makes of a sample's texts; see pipelines/review.py.

    caption_tokens, face_caption_tokens: CLIP tokens of each text, uncut, without BOS and EOS.
    text_tokens: of the training text. cut: share of the two texts' tokens that the training text
    leaves out, 0 to 1. fused: regions whose pictures will be fused into their words. unfused:
    (region, why not). absent: regions that a text names and the label map doesn't hold.
    region_words: for each of REGION_WORDS, words of the clause that names it. trainable: at least
    one region is fused.
    """

    caption_tokens: int
    face_caption_tokens: int
    text_tokens: int
    cut: float
    fused: tuple[str, ...]
    unfused: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    region_words: tuple[int, ...]
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One photograph on its way to a sample; changed only by `dataclasses.replace`."""

    key: str  # KEY_LENGTH hex digits, see key_of
    source: str  # name relative to the source's root
    sha256: str = ""  # of the source's bytes
    license: str = ""
    author: str = ""
    consent: str = ""  # what the source states of the person's consent
    image: bytes = b""
    width: int = 0
    height: int = 0
    source_width: int = 0  # upright pixels of the source
    source_height: int = 0
    thumbnail: bytes = b""  # WebP; stays with a record that has ended
    faces: tuple[Face, ...] = ()
    face: int = -1  # index into faces; -1: none chosen
    parsing: bytes = b""  # PNG label map, 19 CelebAMask-HQ classes, the image's size
    identity: FloatArray | None = None  # float32[512], unit norm
    # of the embedding as it was given: low where a face is hard to recognise
    identity_norm: float | None = None
    measures: Measures | None = None
    caption: str = ""
    face_caption: str = ""
    review: Review | None = None
    status: Status = Status.OK
    reason: str = ""  # snake_case name, e.g. no_face
    detail: str = ""  # what was measured or raised, for people
    stage: str = ""  # where it was dropped or failed

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def quarantined(self) -> bool:
        """Dropped by a rule, and whole all the same: another rule may take it back without a model
        call.
        """
        return (
            self.status is Status.DROPPED
            and bool(self.image and self.parsing)
            and self.identity is not None
        )

    @property
    def main_face(self) -> Face:
        """The chosen face. Raises ValueError if there is none."""
        if not 0 <= self.face < len(self.faces):
            raise ValueError(f"record {self.key} ({self.source}) has no chosen face")
        return self.faces[self.face]


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


_FACE_TYPE = pa.struct(
    [
        pa.field("box", pa.list_(pa.float64(), 4)),
        pa.field("landmarks", pa.list_(pa.float64(), 10)),
        pa.field("score", pa.float64()),
    ]
)

_MEASURES_TYPE = pa.struct(
    [
        (field.name, pa.string() if field.name == "hash" else pa.float64())
        for field in fields(Measures)
    ]
)

ARROW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("license", pa.string()),
        pa.field("author", pa.string()),
        pa.field("consent", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("source_width", pa.int32()),
        pa.field("source_height", pa.int32()),
        pa.field("thumbnail", pa.binary()),
        pa.field("faces", pa.list_(_FACE_TYPE)),
        pa.field("face", pa.int32()),
        pa.field("parsing", pa.large_binary()),
        pa.field("identity", pa.list_(pa.float32())),
        pa.field("identity_norm", pa.float64()),
        pa.field("measures", _MEASURES_TYPE),
        pa.field("caption", pa.string()),
        pa.field("face_caption", pa.string()),
        pa.field("review", pa.string()),  # JSON
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("stage", pa.string()),
    ],
    metadata={"record_schema": str(SCHEMA_VERSION)},
)


def face_to_dict(face: Face) -> dict[str, Any]:
    """Plain, JSON-ready form; the inverse of `face_from_dict`."""
    return {
        "box": list(face.box),
        "landmarks": [value for point in face.landmarks for value in point],
        "score": face.score,
    }


def face_from_dict(row: dict[str, Any]) -> Face:
    flat = [float(value) for value in row["landmarks"]]
    x1, y1, x2, y2 = (float(value) for value in row["box"])
    return Face(
        box=(x1, y1, x2, y2),
        landmarks=tuple(zip(flat[::2], flat[1::2], strict=True)),
        score=row["score"],
    )


def review_to_dict(review: Review) -> dict[str, Any]:
    """Plain, JSON-ready form; the inverse of `review_from_dict`."""
    return asdict(review)


def review_from_dict(row: dict[str, Any]) -> Review:
    lists = {name: tuple(row[name]) for name in ("fused", "absent", "region_words")}
    unfused = tuple((region, reason) for region, reason in row["unfused"])
    return Review(**{**row, **lists, "unfused": unfused})


def to_row(record: Record) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    row["faces"] = [face_to_dict(face) for face in record.faces]
    row["status"] = record.status.value
    row["identity"] = None if record.identity is None else np.asarray(record.identity, np.float32)
    row["measures"] = None if record.measures is None else asdict(record.measures)
    row["review"] = None if record.review is None else json.dumps(review_to_dict(record.review))
    return row


def from_row(row: dict[str, Any]) -> Record:
    """A Record from a row of ARROW_SCHEMA as Python values. Raises KeyError on a missing column."""
    values = {field.name: row[field.name] for field in fields(Record)}
    values["faces"] = tuple(face_from_dict(face) for face in row["faces"])
    values["status"] = Status(row["status"])
    identity = row["identity"]
    values["identity"] = None if identity is None else np.asarray(identity, np.float32)
    values["measures"] = None if row["measures"] is None else Measures(**row["measures"])
    values["review"] = (
        None if row["review"] is None else review_from_dict(json.loads(row["review"]))
    )
    return Record(**values)


def to_table(records: Iterable[Record]) -> pa.Table:
    return pa.Table.from_pylist([to_row(record) for record in records], schema=ARROW_SCHEMA)


def from_table(table: pa.Table) -> list[Record]:
    return [from_row(row) for row in table.to_pylist()]
