"""Sidecar: a shard's parquet, with a row for every input; the columns that reports and tools read.

Figures stand in flat columns, so that those of a million samples are read without touching a nested
one. Faces, label areas and texts are the record's; thumbnails are small enough to carry.
"""

from __future__ import annotations

from typing import Any, Final, cast

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.codec import LONG_SIDE, LabelMap, decode_labels, shrink
from stages.record import SCHEMA_VERSION, Measures, Record, Status, face_from_dict, face_to_dict
from stages.regions import LABELS

Row = dict[str, Any]

# rows: a few thumbnails are read without all of a shard's, and figures not much slower
ROW_GROUP: Final = 250
# no dictionary for these
_NO_TWO_ALIKE: Final = ("key", "sha256", "hash", "thumbnail", "thumbnail_labels", "identity")

_MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_FACE = pa.struct(
    [
        ("box", pa.list_(pa.float64())),
        ("landmarks", pa.list_(pa.float64())),
        ("score", pa.float64()),
    ]
)
_UNFUSED = pa.struct([("region", pa.string()), ("reason", pa.string())])
_FIGURES: Final = ("sharpness", "brightness", "clipped", "yaw", "pitch", "roll", "occlusion")
_REVIEWED: Final = ("caption_tokens", "face_caption_tokens", "text_tokens", "cut", "trainable")

SIDECAR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("stage", pa.string()),
        ("sha256", pa.string()),
        ("tar_offset", pa.int64()),  # of the sample's first header; -1 where none was written
        ("tar_size", pa.int64()),  # bytes of the sample in the tar, headers and padding included
        ("held_offset", pa.int64()),  # the same in the tar of what a rule dropped
        ("held_size", pa.int64()),
        # data offsets, from the beginning of the tar that holds them
        ("members", pa.list_(_MEMBER)),
        ("license", pa.string()),
        ("author", pa.string()),
        ("consent", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("faces", pa.list_(_FACE)),
        ("face", pa.int32()),
        ("face_count", pa.int32()),
        ("score", pa.float64()),  # detection score of the chosen face; null where there is none
        ("face_side", pa.float64()),  # short side of its box, pixels
        # share of the picture, one for each of the 19 labels
        ("label_areas", pa.list_(pa.float32())),
        *((name, pa.float64()) for name in _FIGURES),  # stages.record.Measures
        ("hash", pa.string()),
        ("identity", pa.list_(pa.float32())),
        ("identity_norm", pa.float64()),
        ("caption", pa.string()),
        ("face_caption", pa.string()),
        ("caption_tokens", pa.int32()),  # from here on stages.record.Review
        ("face_caption_tokens", pa.int32()),
        ("text_tokens", pa.int32()),
        ("cut", pa.float64()),
        ("trainable", pa.bool_()),
        ("fused", pa.list_(pa.string())),
        ("unfused", pa.list_(_UNFUSED)),
        ("absent", pa.list_(pa.string())),
        ("region_words", pa.list_(pa.int32())),
        ("thumbnail", pa.binary()),  # WebP
        ("thumbnail_labels", pa.binary()),  # 8-bit grey PNG of label ids, the thumbnail's size
    ],
    metadata={"record_schema": str(SCHEMA_VERSION)},
)


def write_sidecar(table: pa.Table, stream: Any) -> None:
    repeating = [name for name in table.schema.names if name not in _NO_TWO_ALIKE]
    pq.write_table(
        table,
        cast(Any, stream),
        compression="zstd",
        row_group_size=ROW_GROUP,
        use_dictionary=cast(Any, repeating),
    )


def sidecar_row(record: Record) -> Row:
    """A record's row; where its sample lies, the tar's writer fills in."""
    labels = decode_labels(record.parsing) if record.parsing else None
    face = record.main_face if 0 <= record.face < len(record.faces) else None
    measures, review = record.measures, record.review
    plain = (
        *(
            "key",
            "source",
            "reason",
            "detail",
            "stage",
            "sha256",
            "license",
            "author",
            "consent",
            "width",
            "height",
        ),
        *(
            "source_width",
            "source_height",
            "face",
            "identity_norm",
            "caption",
            "face_caption",
            "thumbnail",
        ),
    )
    return {
        **{name: getattr(record, name) for name in plain},
        "status": record.status.value,
        **{"tar_offset": -1, "tar_size": 0, "held_offset": -1, "held_size": 0, "members": []},
        "faces": [face_to_dict(each) for each in record.faces],
        "face_count": len(record.faces),
        "score": face.score if face else None,
        "face_side": face.side if face else None,
        "label_areas": [] if labels is None else _label_areas(labels),
        **{name: getattr(measures, name) if measures else None for name in _FIGURES},
        "hash": measures.hash if measures else "",
        "identity": record.identity,
        **{name: getattr(review, name) if review else None for name in _REVIEWED},
        "fused": list(review.fused) if review else [],
        "unfused": [{"region": region, "reason": reason} for region, reason in review.unfused]
        if review
        else [],
        "absent": list(review.absent) if review else [],
        "region_words": list(review.region_words) if review else [],
        "thumbnail_labels": b""
        if labels is None or not record.thumbnail
        else _small_labels(labels),
    }


def ended_record(row: Row) -> Record:
    """The record of a row without a sample: how it ended, and what was measured before; no payload,
    but a thumbnail.
    """
    plain = (
        *(
            "key",
            "source",
            "sha256",
            "license",
            "author",
            "consent",
            "width",
            "height",
            "source_width",
        ),
        *("source_height", "face", "identity_norm", "reason", "detail", "stage", "thumbnail"),
    )
    measured = row["sharpness"] is not None
    return Record(
        status=Status(row["status"]),
        faces=tuple(face_from_dict(face) for face in row["faces"]),
        measures=Measures(hash=row["hash"], **{name: row[name] for name in _FIGURES})
        if measured
        else None,
        **{name: row[name] for name in plain},
    )


def _label_areas(labels: LabelMap) -> list[float]:
    """Each label's share of the picture. Counted by runs of equal labels: there are few, of many
    pixels.
    """
    flat = labels.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    pixels = np.bincount(flat[starts], np.diff(starts, append=flat.size), len(LABELS))
    return list(pixels / flat.size)


def _small_labels(labels: LabelMap) -> bytes:
    done, data = cv2.imencode(".png", shrink(labels, LONG_SIDE), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done, "OpenCV encodes any uint8 array"
    return data.tobytes()
