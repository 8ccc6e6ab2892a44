"""Sidecar: a shard's parquet file, with a row for every input.

Metrics are flat columns, so that those of a million samples are read without touching a nested one.
Each column's description, and how it is shown, is in the file's own schema: whoever displays a data
set needs no list of columns, and shows columns that a later program wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final, cast

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ConfigError
from stages.annotations import Measures, Review
from stages.codec import THUMBNAIL_SIDE, LabelMap, decode_labels, shrink
from stages.fields import Annotation, Column, Metric, columns_of
from stages.record import Record, Status, face_from_dict, face_to_dict
from stages.regions import LABELS
from stages.storage import version2
from stages.storage.layout import FORMAT_VERSION

Row = dict[str, Any]

ROW_GROUP: Final = 250  # rows: a few thumbnails are read without reading all of a shard's
_UNIQUE: Final = ("key", "sha256", "hash", "thumbnail", "thumbnail_labels", "identity")
_VERSION: Final = b"format_version"


@dataclass(frozen=True, slots=True)
class _Derived:
    """A column that is computed from a record and its label map (H, W) or None."""

    column: Column
    value: Callable[[Record, LabelMap | None], Any]


def _label_areas(labels: LabelMap | None) -> list[float]:
    """Counted by runs of equal labels: there are few runs, of many pixels."""
    if labels is None:
        return []
    flat = labels.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    pixels = np.bincount(flat[starts], np.diff(starts, append=flat.size), len(LABELS))
    return list(pixels / flat.size)


def _small_labels(record: Record, labels: LabelMap | None) -> bytes:
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
            description="how many faces were found",
            metric=Metric(title="Faces per image", note="all faces found", whole=True),
        ),
        lambda record, _: len(record.faces),
    ),
    _Derived(
        Column(
            name="score",
            type=pa.float64(),
            description="detection score of the chosen face, 0 to 1; null where there is none",
            metric=Metric(title="Detection score", note="of the chosen face"),
        ),
        lambda record, _: record.main_face.score if _has_face(record) else None,
    ),
    _Derived(
        Column(
            name="face_side",
            type=pa.float64(),
            description="short side of the chosen face's box, pixels",
            metric=Metric(title="Face size", unit="px", note="short side of the box"),
        ),
        lambda record, _: record.main_face.side if _has_face(record) else None,
    ),
    _Derived(
        Column(
            name="label_areas",
            type=pa.list_(pa.float32()),
            description="share of the picture for each of the 19 labels",
        ),
        lambda _, labels: _label_areas(labels),
    ),
    _Derived(
        Column(
            name="thumbnail_labels",
            type=pa.binary(),
            description="label map of the thumbnail: 8-bit grey PNG",
        ),
        _small_labels,
    ),
)

_MEMBER: Final = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_PLACES: Final = (
    Column(
        name="tar_offset",
        type=pa.int64(),
        description="where the sample begins in the shard's tar, bytes; -1: not there",
    ),
    Column(
        name="tar_size", type=pa.int64(), description="bytes of the sample in the tar, with headers"
    ),
    Column(
        name="quarantine_offset",
        type=pa.int64(),
        description="where it begins in the quarantine tar, which holds complete samples that were "
        "dropped; -1: not there",
    ),
    Column(
        name="quarantine_size", type=pa.int64(), description="bytes of it in the quarantine tar"
    ),
    Column(
        name="members",
        type=pa.list_(_MEMBER),
        description="name, data offset and size of each of the sample's files, in the tar that "
        "holds it",
    ),
)
_NOWHERE: Final[Row] = {
    "tar_offset": -1,
    "tar_size": 0,
    "quarantine_offset": -1,
    "quarantine_size": 0,
    "members": [],
}


def sidecar_columns(annotations: Sequence[type[Annotation]]) -> list[Column]:
    """The columns of a sidecar whose chain records these annotations.

    Raises ConfigError where two of them have the same name.
    """
    columns = [
        *columns_of(Record),
        *_PLACES,
        *(derived.column for derived in _DERIVED),
        *(column for kind in annotations for column in columns_of(kind, kind.name)),
    ]
    names = [column.name for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two stages record a column called {', '.join(twice)}. Rename the field of one of "
            "them."
        )
    return columns


KNOWN: Final = {column.name: column for column in sidecar_columns((Measures, Review))}
"""The columns that this program's own stages write; version 2 sidecars don't describe theirs."""


def write_sidecar(
    rows: Sequence[Row], annotations: Sequence[type[Annotation]], stream: IO[bytes]
) -> None:
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
    )


def sidecar_row(record: Record, annotations: Sequence[type[Annotation]]) -> Row:
    """A record's row. The commit fills in where its sample is."""
    labels = decode_labels(record.parsing) if record.parsing else None
    row: Row = {column.name: getattr(record, column.name) for column in columns_of(Record)}
    row["status"] = record.status.value
    row["faces"] = [face_to_dict(face) for face in record.faces]
    row |= _NOWHERE
    row |= {derived.column.name: derived.value(record, labels) for derived in _DERIVED}
    for kind in annotations:
        values = record.annotations.get(kind.name, {})
        row |= {column.name: values.get(column.name) for column in columns_of(kind)}
    return row


class SidecarFile:
    """An open sidecar of any readable version, seen as one of this version."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self._old = _VERSION not in (file.schema_arrow.metadata or {})

    @property
    def columns(self) -> dict[str, Column]:
        """name → column, in the file's order."""
        schema = self._file.schema_arrow
        if self._old:
            names = version2.table(schema.empty_table()).column_names
            return {name: KNOWN[name] for name in names if name in KNOWN}
        return {field.name: Column.from_arrow(field) for field in schema}

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]

    def read(
        self, columns: Sequence[Column | str] | None = None, groups: Sequence[int] | None = None
    ) -> pa.Table:
        """Rows in input order, of all row groups or some. A column that the file lacks is null.

        columns: all that the file has if None. Raises KeyError for a name that is neither in the
        file nor one of this program's.
        """
        own = self.columns
        wanted = [c if isinstance(c, Column) else own.get(c) or KNOWN[c] for c in columns or own]
        present = [column.name for column in wanted if column.name in own]
        names = version2.physical_columns(present) if self._old else present
        every = range(self._file.num_row_groups)
        table = self._file.read_row_groups(
            list(every if groups is None else groups), names, use_threads=False
        )
        if self._old:
            table = version2.table(table)
        arrays = [
            table.column(column.name)
            if column.name in own
            else pa.nulls(table.num_rows, column.type)
            for column in wanted
        ]
        return pa.table(arrays, names=[column.name for column in wanted])


def is_quarantined(row: Mapping[str, Any]) -> bool:
    """True of a row whose sample is in the quarantine tar."""
    return bool(row["quarantine_offset"] >= 0)


def row_to_record(row: Mapping[str, Any], columns: Mapping[str, Column]) -> Record:
    """The record of a row without a sample: why it was dropped or failed, what was measured before,
    its thumbnail, and no other payload. columns: of the file that the row is from."""
    names = [column.name for column in columns_of(Record) if column.name in row]
    values = {
        name: row[name] for name in names if name not in ("identity", "caption", "face_caption")
    }
    values["status"] = Status(row["status"])
    values["faces"] = tuple(face_from_dict(face) for face in row["faces"])
    return Record(**values, annotations=dict(_annotations(row, columns)))


def _annotations(
    row: Mapping[str, Any], columns: Mapping[str, Column]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those whose first column is not null: the others were never recorded for this row."""
    by_annotation: dict[str, list[str]] = {}
    for column in columns.values():
        if column.annotation:
            by_annotation.setdefault(column.annotation, []).append(column.name)
    for annotation, names in by_annotation.items():
        if row[names[0]] is not None:
            yield annotation, {name: row[name] for name in names}
