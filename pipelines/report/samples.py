"""Samples: the records that the page holds, with their thumbnails.

Where the data set is larger than the page, each shard gives its part, drawn by the shard's number
from as few row groups as hold it, so that no shard's pictures are all read; and of every reason the
first few records are there in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.report import metrics
from pipelines.report.distribution import Floats
from pipelines.report.identities import neighbours
from pipelines.report.metrics import ShownMetric
from pipelines.report.scan import End
from stages.annotations import absent_words, fused_words, unfused_words
from stages.fields import Column
from stages.regions import LABELS
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader

_THREADS: Final = 4
_PLAIN: Final = (
    *("key", "source", "status", "reason", "stage", "detail", "sha256", "license", "author"),
    *("consent", "tar_offset", "tar_size", "quarantine_offset", "quarantine_size", "width"),
    *("height", "source_width", "source_height", "faces", "face", "caption", "face_caption"),
    *("trainable", "regions"),
)
_PICTURES: Final = ("thumbnail", "thumbnail_labels")
EXTRA: Final = ("identity_size", "similarity")  # metrics of a sample that its sidecar doesn't have


@dataclass(frozen=True, slots=True)
class Samples:
    """columns: name → a value for each record, JSON-ready. values: (metrics and EXTRA, records),
    NaN for none. pictures: (WebP, label PNG) of each record, empty where there is none.
    """

    columns: dict[str, list[Any]]
    values: Floats
    pictures: list[tuple[bytes, bytes]]

    def __len__(self) -> int:
        return len(self.pictures)


def read_samples(
    reader: DatasetReader,
    manifests: Sequence[Manifest],
    examples: Mapping[End, Sequence[tuple[int, int]]],
    count: int,
    shown: Sequence[ShownMetric],
    columns: Mapping[str, Column],
) -> Samples:
    """`count` records spread evenly over the shards, and the examples; in the shards' order. Raises
    ShardError."""
    example_rows: dict[int, set[int]] = {}
    for rows in examples.values():
        for shard, row in rows:
            example_rows.setdefault(shard, set()).add(row)
    wanted: list[Column | str] = [*_PLAIN, *_PICTURES, *metrics.columns_of(shown, columns)]
    parts = _parts([manifest.inputs for manifest in manifests], count)
    jobs = [
        (manifest.index, sorted(example_rows.get(manifest.index, ())), part)
        for manifest, part in zip(manifests, parts, strict=True)
        if part or manifest.index in example_rows
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(lambda job: _read(reader, wanted, *job), jobs))
    return _samples(reader, pa.concat_tables(tables).combine_chunks(), shown)


def _parts(inputs: Sequence[int], count: int) -> list[int]:
    """How many of each shard: in proportion, and exactly `count` in all where there are as many."""
    ends = np.cumsum([0, *inputs])
    total = int(ends[-1])
    shares = (ends * min(count, total) + total // 2) // max(total, 1)
    parts: list[int] = np.diff(shares).tolist()
    return parts


def _read(
    reader: DatasetReader,
    columns: Sequence[Column | str],
    index: int,
    rows: Sequence[int],
    part: int,
) -> pa.Table:
    """These rows of a shard, and `part` drawn ones."""
    names = [column if isinstance(column, str) else column.name for column in columns]
    unique = [columns[names.index(name)] for name in dict.fromkeys(names)]
    with reader.sidecar(index) as file:
        sizes = file.group_sizes
        starts = np.cumsum([0, *sizes])
        chosen = sorted({*rows, *_drawn(starts, index, part)})
        groups = sorted({int(group) for group in np.searchsorted(starts, chosen, "right") - 1})
        table = file.read(unique, groups)
    offsets = np.cumsum([0, *(sizes[group] for group in groups)]).tolist()
    place = dict(zip(groups, offsets, strict=False))
    at = [place[int(np.searchsorted(starts, row, "right")) - 1] for row in chosen]
    inside = [row - int(starts[np.searchsorted(starts, row, "right") - 1]) for row in chosen]
    table = table.take(pa.array(np.add(at, inside), pa.int64()))
    return table.append_column("shard", pa.array([index] * len(table), pa.int32()))


def _drawn(starts: np.ndarray[Any, np.dtype[np.int64]], index: int, part: int) -> list[int]:
    """`part` rows of as few row groups as hold them, by the shard's number alone."""
    rng = np.random.default_rng(index)
    rows: list[int] = []
    for group in rng.permutation(len(starts) - 1).tolist():
        here = np.arange(starts[group], starts[group + 1])
        rows += rng.permutation(here)[: part - len(rows)].tolist()
        if len(rows) == part:
            break
    return rows


def _samples(reader: DatasetReader, table: pa.Table, shown: Sequence[ShownMetric]) -> Samples:
    columns = {name: table[name].to_pylist() for name in [*_PLAIN, "shard"]}
    sizes = zip(*(columns[name] for name in ("faces", "width", "height")), strict=True)
    columns["faces"] = [_boxes(*row) for row in sizes]
    statuses = [row or [] for row in columns.pop("regions")]
    columns["fused"] = [list(fused_words(row)) for row in statuses]
    columns["absent"] = [list(absent_words(row)) for row in statuses]
    columns["unfused"] = [[f"{w}:{reason}" for w, reason in unfused_words(r)] for r in statuses]
    columns["missing"] = _missing(metrics.label_matrix(table))
    rows = neighbours(reader, columns["key"])
    people = [rows.get(key) for key in columns["key"]]
    for name in ("identity_id", "split"):
        columns[name] = [row[name] if row else "" for row in people]
    columns["nearest"] = [row["nearest"] if row else [] for row in people]
    columns["similarity"] = [
        [round(v, 3) for v in row["similarity"]] if row else [] for row in people
    ]
    extra = [
        [row["identity_size"] if row else np.nan for row in people],
        [row["similarity"][0] if row and row["similarity"] else np.nan for row in people],
    ]
    pictures = list(zip(*(table[name].to_pylist() for name in _PICTURES), strict=True))
    return Samples(columns, np.concatenate([metrics.matrix(table, shown), extra]), pictures)


def _boxes(faces: Sequence[Mapping[str, Any]], width: int, height: int) -> list[list[float]]:
    """x, y, width, height of each box, in parts of the picture."""
    boxes = []
    for face in faces:
        x1, y1, x2, y2 = face["box"]
        boxes.append(
            [round(v, 4) for v in (x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height)]
        )
    return boxes


def _missing(labels: Floats) -> list[int]:
    """A bit for each label without a pixel; -1 without a label map."""
    bits = (labels == 0).T @ (1 << np.arange(len(LABELS)))
    missing: list[int] = np.where(np.isnan(labels).any(0), -1, bits).tolist()
    return missing
