"""Page records: the records that the page shows, with their thumbnails.

Of a larger data set they are a random selection, in proportion to the size of each shard, with its
number as seed. They come from few row groups, so that most thumbnails are not read. The first few
records of every reason are always among them.
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
from pipelines.report.identities import identity_rows
from pipelines.report.metrics import ShownMetric
from pipelines.report.scan import Outcome
from stages.annotations import Claims, absent_words, fused_words, unfused_words
from stages.fields import Column, columns_of
from stages.record import PROVENANCE
from stages.regions import LABELS
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader

_THREADS: Final = 4
_PLAIN: Final = (
    *("key", "source", "status", "reason", "stage", "detail", "sha256", *PROVENANCE),
    *("tar_offset", "tar_size", "quarantine_offset", "quarantine_size", "width", "height"),
    *("source_width", "source_height", "faces", "face", "caption", "face_caption"),
    *("trainable", "regions"),
)
_CONTRADICTED: Final = next(c for c in columns_of(Claims, Claims.name) if c.name == "contradicted")
_THUMBNAILS: Final = ("thumbnail", "thumbnail_labels")
IDENTITY_METRICS: Final = ("identity_size", "similarity")  # from identities.parquet


@dataclass(frozen=True, slots=True)
class PageRecords:
    """columns: name → a value for each record, JSON-ready. values: (metrics and IDENTITY_METRICS,
    records), NaN for none. thumbnails: (WebP image, PNG label map) of each record, empty for none.
    """

    columns: dict[str, list[Any]]
    values: Floats
    thumbnails: list[tuple[bytes, bytes]]

    def __len__(self) -> int:
        return len(self.thumbnails)


def read_page_records(
    reader: DatasetReader,
    manifests: Sequence[Manifest],
    examples: Mapping[Outcome, Sequence[tuple[int, int]]],
    count: int,
    shown: Sequence[ShownMetric],
    columns: Mapping[str, Column],
) -> PageRecords:
    """`count` records of all shards, and the examples (shard, row), in the order of the sidecars.
    Raises ShardError."""
    example_rows: dict[int, set[int]] = {}
    for rows in examples.values():
        for shard, row in rows:
            example_rows.setdefault(shard, set()).add(row)
    wanted: list[Column | str] = [
        *_PLAIN,
        _CONTRADICTED,
        *_THUMBNAILS,
        *metrics.columns_of(shown, columns),
    ]
    quotas = _quotas([manifest.inputs for manifest in manifests], count)
    jobs = [
        (manifest.index, sorted(example_rows.get(manifest.index, ())), quota)
        for manifest, quota in zip(manifests, quotas, strict=True)
        if quota or manifest.index in example_rows
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(lambda job: _read(reader, wanted, *job), jobs))
    return _page_records(reader, pa.concat_tables(tables).combine_chunks(), shown)


def _quotas(inputs: Sequence[int], count: int) -> list[int]:
    """Records of each shard, in proportion to its inputs; their sum is `count`, or all inputs where
    there are fewer."""
    ends = np.cumsum([0, *inputs])
    total = int(ends[-1])
    quota_ends = (ends * min(count, total) + total // 2) // max(total, 1)
    quotas: list[int] = np.diff(quota_ends).tolist()
    return quotas


def _read(
    reader: DatasetReader,
    columns: Sequence[Column | str],
    index: int,
    rows: Sequence[int],
    quota: int,
) -> pa.Table:
    """These rows of a shard, and `quota` random ones, in order."""
    names = [column if isinstance(column, str) else column.name for column in columns]
    unique = [columns[names.index(name)] for name in dict.fromkeys(names)]
    with reader.sidecar(index) as file:
        sizes = file.group_sizes
        starts = np.cumsum([0, *sizes])
        chosen = sorted({*rows, *_random_rows(starts, index, quota)})
        groups = sorted({int(group) for group in np.searchsorted(starts, chosen, "right") - 1})
        table = file.read(unique, groups)
    offsets = np.cumsum([0, *(sizes[group] for group in groups)]).tolist()
    place = dict(zip(groups, offsets, strict=False))
    at = [place[int(np.searchsorted(starts, row, "right")) - 1] for row in chosen]
    inside = [row - int(starts[np.searchsorted(starts, row, "right") - 1]) for row in chosen]
    table = table.take(pa.array(np.add(at, inside), pa.int64()))
    return table.append_column("shard", pa.array([index] * len(table), pa.int32()))


def _random_rows(starts: np.ndarray[Any, np.dtype[np.int64]], seed: int, count: int) -> list[int]:
    """`count` rows of as few row groups as possible. starts: first row of each group, and the
    end."""
    rng = np.random.default_rng(seed)
    rows: list[int] = []
    for group in rng.permutation(len(starts) - 1).tolist():
        of_group = np.arange(starts[group], starts[group + 1])
        rows += rng.permutation(of_group)[: count - len(rows)].tolist()
        if len(rows) == count:
            break
    return rows


def _page_records(
    reader: DatasetReader, table: pa.Table, shown: Sequence[ShownMetric]
) -> PageRecords:
    columns = {name: table[name].to_pylist() for name in [*_PLAIN, "contradicted", "shard"]}
    sizes = zip(*(columns[name] for name in ("faces", "width", "height")), strict=True)
    columns["faces"] = [_boxes(*row) for row in sizes]
    statuses = [row or [] for row in columns.pop("regions")]
    columns["fused"] = [list(fused_words(row)) for row in statuses]
    columns["absent"] = [list(absent_words(row)) for row in statuses]
    columns["unfused"] = [[f"{w}:{reason}" for w, reason in unfused_words(r)] for r in statuses]
    columns["missing"] = _missing(metrics.label_matrix(table))
    by_key = identity_rows(reader, columns["key"])
    identities = [by_key.get(key) for key in columns["key"]]
    for name in ("identity_id", "split"):
        columns[name] = [row[name] if row else "" for row in identities]
    columns["nearest"] = [row["nearest"] if row else [] for row in identities]
    columns["similarity"] = [
        [round(v, 3) for v in row["similarity"]] if row else [] for row in identities
    ]
    identity_metrics = [
        [row["identity_size"] if row else np.nan for row in identities],
        [row["similarity"][0] if row and row["similarity"] else np.nan for row in identities],
    ]
    thumbnails = list(zip(*(table[name].to_pylist() for name in _THUMBNAILS), strict=True))
    values = np.concatenate([metrics.matrix(table, shown), identity_metrics])
    return PageRecords(columns, values, thumbnails)


def _boxes(faces: Sequence[Mapping[str, Any]], width: int, height: int) -> list[list[float]]:
    """x, y, width, height of each box, as shares of the image's width and height."""
    boxes = []
    for face in faces:
        x1, y1, x2, y2 = face["box"]
        boxes.append(
            [round(v, 4) for v in (x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height)]
        )
    return boxes


def _missing(labels: Floats) -> list[int]:
    """A bit mask of the labels without a pixel, for each record; -1 without a label map."""
    bits = (labels == 0).T @ (1 << np.arange(len(LABELS)))
    missing: list[int] = np.where(np.isnan(labels).any(0), -1, bits).tolist()
    return missing
