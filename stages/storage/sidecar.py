"""Sidecar: a shard's parquet file, with a row for every input.

Metrics are flat columns, so that they can be read without reading nested ones. The file's schema
holds each column's description and how to display it: programs that display a data set need no list
of columns, and also display columns that a later version wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Final, cast

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ConfigError
from stages.annotations import Measures, Review
from stages.codec import THUMBNAIL_SIDE, LabelMap, decode_labels, shrink
from stages.fields import Annotation, Column, Metric, columns_of
from stages.record import EMBEDDINGS, Record, Status, face_from_dict, face_to_dict
from stages.regions import LABELS
from stages.storage import version2
from stages.storage.layout import FORMAT_VERSION

Row = dict[str, Any]

ROW_GROUP: Final = 250  # rows; so that a few thumbnails can be read without all of a shard's
_UNIQUE: Final = (
    *("key", "sha256", "sample_sha256", "hash", "thumbnail", "thumbnail_labels"),
    *EMBEDDINGS,
)
_VERSION: Final = b"format_version"


@dataclass(frozen=True, slots=True)
class _Derived:
    """A column that is computed from a record and its label map (H, W), which may be None."""

    column: Column
    value: Callable[[Record, LabelMap | None], Any]


def _label_areas(labels: LabelMap | None) -> list[float]:
    """Returns the share of each label, 0 to 1; [] without a label map."""
    if labels is None:
        return []
    # counts runs of equal labels, of which there are far fewer than pixels
    flat = labels.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    pixels = np.bincount(flat[starts], np.diff(starts, append=flat.size), len(LABELS))
    return list(pixels / flat.size)


def _thumbnail_labels(record: Record, labels: LabelMap | None) -> bytes:
    if labels is None or not record.thumbnail:
        return b""
    small = shrink(labels, THUMBNAIL_SIDE)
    success, data = cv2.imencode(".png", small, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert success, "OpenCV encodes any uint8 array"
    return data.tobytes()


def _has_face(record: Record) -> bool:
    return 0 <= record.face < len(record.faces)


_DERIVED: Final = (
    _Derived(
        Column(
            name="face_count",
            type=pa.int32(),
            description="number of detected faces",
            metric=Metric(title="Faces per image", note="all detected faces", whole=True),
        ),
        lambda record, _: len(record.faces),
    ),
    _Derived(
        Column(
            name="score",
            type=pa.float64(),
            description="detection score of the main face, 0 to 1; null if there is none",
            metric=Metric(title="Detection score", note="of the main face"),
        ),
        lambda record, _: record.main_face.score if _has_face(record) else None,
    ),
    _Derived(
        Column(
            name="face_side",
            type=pa.float64(),
            description="short side of the main face's box, pixels",
            metric=Metric(title="Face size", unit="px", note="short side of the box"),
        ),
        lambda record, _: record.main_face.side if _has_face(record) else None,
    ),
    _Derived(
        Column(
            name="label_areas",
            type=pa.list_(pa.float32()),
            description="share of the image, 0 to 1, of each of the 19 labels",
        ),
        lambda _, labels: _label_areas(labels),
    ),
    _Derived(
        Column(
            name="thumbnail_labels",
            type=pa.binary(),
            description="label map of the thumbnail: 8-bit grey PNG",
        ),
        _thumbnail_labels,
    ),
)

_MEMBER: Final = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_PLACES: Final = (
    Column(
        name="tar_offset",
        type=pa.int64(),
        description="where the sample begins in the shard's tar, bytes; -1: it isn't in it",
    ),
    Column(
        name="tar_size", type=pa.int64(), description="bytes of the sample in the tar, with headers"
    ),
    Column(
        name="quarantine_offset",
        type=pa.int64(),
        description="where the sample begins in the quarantine tar, which has complete dropped "
        "samples, bytes; -1: it isn't in it",
    ),
    Column(
        name="quarantine_size",
        type=pa.int64(),
        description="bytes of the sample in the quarantine tar, with headers",
    ),
    Column(
        name="members",
        type=pa.list_(_MEMBER),
        description="name, data offset and size of each of the sample's files, in its tar",
    ),
    Column(
        name="sample_sha256",
        type=pa.string(),
        description="digest of the sample's bytes in its tar, with headers",
    ),
)
_IN_NO_TAR: Final[Row] = {
    "tar_offset": -1,
    "tar_size": 0,
    "quarantine_offset": -1,
    "quarantine_size": 0,
    "members": [],
    "sample_sha256": "",
}


def sidecar_columns(annotations: Sequence[type[Annotation]]) -> list[Column]:
    """Returns the columns of a sidecar whose chain records these annotations.

    Raises ConfigError if two columns have the same name.
    """
    columns = [
        *columns_of(Record),
        *_PLACES,
        *(derived.column for derived in _DERIVED),
        *(column for kind in annotations for column in columns_of(kind, kind.name)),
    ]
    names = [column.name for column in columns]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two stages record a column called {', '.join(repeated)}. Rename the field of one of "
            "them."
        )
    return columns


# name → column, of the columns that sidecars of version 2 have. Those don't describe their columns;
# later sidecars do.
STANDARD_COLUMNS: Final = {column.name: column for column in sidecar_columns((Measures, Review))}


def write_sidecar(
    rows: Sequence[Row], annotations: Sequence[type[Annotation]], stream: IO[bytes]
) -> None:
    """Writes rows as parquet. annotations: of the chain."""
    columns = sidecar_columns(annotations)
    schema = pa.schema(
        [column.to_arrow() for column in columns], metadata={_VERSION: str(FORMAT_VERSION)}
    )
    repeating = [column.name for column in columns if column.name not in _UNIQUE]
    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=schema),
        cast(Any, stream),
        compression="zstd",
        row_group_size=ROW_GROUP,
        use_dictionary=cast(Any, repeating),
        write_page_checksum=True,
    )


def sidecar_row(record: Record, annotations: Sequence[type[Annotation]]) -> Row:
    """Returns a record's row, without the place of its sample, which the commit adds. annotations:
    of the chain.
    """
    labels = decode_labels(record.parsing) if record.parsing else None
    row: Row = {column.name: getattr(record, column.name) for column in columns_of(Record)}
    row["status"] = record.status.value
    row["faces"] = [face_to_dict(face) for face in record.faces]
    row |= _IN_NO_TAR
    row |= {derived.column.name: derived.value(record, labels) for derived in _DERIVED}
    for kind in annotations:
        values = record.annotations.get(kind.name, {})
        row |= {column.name: values.get(column.name) for column in columns_of(kind)}
    return row


class SidecarFile:
    """An open sidecar. A file of version 2 is converted to the present version."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self._is_version2 = _VERSION not in (file.schema_arrow.metadata or {})

    @property
    def columns(self) -> dict[str, Column]:
        """name → column, in the file's order."""
        schema = self._file.schema_arrow
        if self._is_version2:
            names = version2.table(schema.empty_table()).column_names
            return {name: STANDARD_COLUMNS[name] for name in names if name in STANDARD_COLUMNS}
        return {field.name: Column.from_arrow(field) for field in schema}

    @property
    def group_sizes(self) -> list[int]:
        """The number of rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]

    def read(
        self, columns: Sequence[Column | str] | None = None, groups: Sequence[int] | None = None
    ) -> pa.Table:
        """Returns rows in input order. A column that the file doesn't have is null.

        columns: None means all of the file. groups: numbers of row groups; None means all. Raises
        KeyError for a column that neither the file nor STANDARD_COLUMNS has.
        """
        in_file = self.columns
        requested = [
            c if isinstance(c, Column) else in_file.get(c) or STANDARD_COLUMNS[c]
            for c in columns or in_file
        ]
        present = [column.name for column in requested if column.name in in_file]
        names = version2.physical_columns(present) if self._is_version2 else present
        every = range(self._file.num_row_groups)
        table = self._file.read_row_groups(
            list(every if groups is None else groups), names, use_threads=False
        )
        if self._is_version2:
            table = version2.table(table)
        arrays = [
            table.column(column.name)
            if column.name in in_file
            else pa.nulls(table.num_rows, column.type)
            for column in requested
        ]
        return pa.table(arrays, names=[column.name for column in requested])


def is_quarantined(row: Mapping[str, Any]) -> bool:
    """Returns whether the row's sample is in the quarantine tar."""
    return bool(row["quarantine_offset"] >= 0)


def has_sample(row: Mapping[str, Any]) -> bool:
    """Returns whether one of the shard's tars has a sample of the row."""
    return row["status"] == Status.OK or is_quarantined(row)


def with_row_fields(sample: Record, row: Mapping[str, Any]) -> Record:
    """Returns a sample with the fields that only its row has: the thumbnail, the embeddings of the
    other faces, and why it was dropped.
    """
    values = {name: row[name] for name in ("reason", "detail", "stage", "thumbnail")}
    others = row.get("other_identities")  # None: the shard is older than this column
    if others is not None:
        values["other_identities"] = np.asarray(others, np.float32)
    return replace(sample, status=Status(row["status"]), **values)


def row_to_record(row: Mapping[str, Any], columns: Mapping[str, Column]) -> Record:
    """Returns the record of a dropped or failed row without a sample. It has the reason, earlier
    measurements and the thumbnail, but no image, label map, embeddings and captions.

    columns: of the row's file.
    """
    names = [column.name for column in columns_of(Record) if column.name in row]
    left_out = (*EMBEDDINGS, "caption", "face_caption")
    values = {name: row[name] for name in names if name not in left_out}
    values["status"] = Status(row["status"])
    values["faces"] = tuple(face_from_dict(face) for face in row["faces"])
    return Record(**values, annotations=dict(_annotations(row, columns)))


def _annotations(
    row: Mapping[str, Any], columns: Mapping[str, Column]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, values) of the row's annotations: those whose first column is not null."""
    by_annotation: dict[str, list[str]] = {}
    for column in columns.values():
        if column.annotation:
            by_annotation.setdefault(column.annotation, []).append(column.name)
    for annotation, names in by_annotation.items():
        if row[names[0]] is not None:
            yield annotation, {name: row[name] for name in names}
