"""Samples: the records that the page's browser holds, with their thumbnails.

Of a set that is larger than the browser, each shard gives its part, drawn by the shard's number
from one row group, so that no shard's pictures are read whole; and of every reason the first few
records are there in any case.
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
from pipelines.report.scan import End, Row, open_sidecar
from stages.regions import LABELS
from stages.storage.store import Store

_THREADS: Final = 4
_WORDS: Final = [
    *(
        "key",
        "source",
        "status",
        "reason",
        "stage",
        "detail",
        "sha256",
        "license",
        "author",
        "consent",
    ),
    *(
        "tar_offset",
        "tar_size",
        "held_offset",
        "held_size",
        "width",
        "height",
        "source_width",
        "source_height",
    ),
    *("faces", "face", "caption", "face_caption", "trainable", "fused", "unfused", "absent"),
]
_PICTURES: Final = ["thumbnail", "thumbnail_labels"]
EXTRA: Final = ("identity_size", "similarity")  # figures of a sample that its sidecar doesn't have


@dataclass(frozen=True, slots=True)
class Samples:
    """columns: name → a value for each record, ready for JSON. values: (figures and EXTRA,
    records), NaN for none. pictures: (WebP, label PNG) of each, empty where there is none.
    """

    columns: dict[str, list[Any]]
    values: Floats
    pictures: list[tuple[bytes, bytes]]

    def __len__(self) -> int:
        return len(self.pictures)


def read_samples(
    store: Store,
    manifests: Sequence[Row],
    examples: Mapping[End, Sequence[tuple[int, int]]],
    count: int,
) -> Samples:
    """`count` records spread evenly over the shards, and the examples; in the shards' order. Raises
    ShardError.
    """
    wanted: dict[int, set[int]] = {}
    for rows in examples.values():
        for shard, row in rows:
            wanted.setdefault(shard, set()).add(row)
    jobs = []
    for manifest, part in zip(
        manifests, _parts([m["inputs"] for m in manifests], count), strict=True
    ):
        index = int(manifest["shard"].rpartition("-")[2])
        if part or index in wanted:
            jobs.append((store, manifest["shard"], index, sorted(wanted.get(index, ())), part))
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(lambda job: _read(*job), jobs))
    return _samples(store, pa.concat_tables(tables).combine_chunks())


def _parts(inputs: Sequence[int], count: int) -> list[int]:
    """How many of each shard: in proportion, and exactly `count` in all where there are as many."""
    ends = np.cumsum([0, *inputs])
    total = int(ends[-1])
    shares = (ends * min(count, total) + total // 2) // max(total, 1)
    parts: list[int] = np.diff(shares).tolist()
    return parts


def _read(store: Store, name: str, index: int, rows: Sequence[int], part: int) -> pa.Table:
    with open_sidecar(store, name) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        chosen = sorted({*rows, *_drawn(starts, index, part)})
        groups = sorted({int(group) for group in np.searchsorted(starts, chosen, "right") - 1})
        columns = [*dict.fromkeys([*_WORDS, *metrics.COLUMNS, *_PICTURES])]
        table = file.read_row_groups(groups, columns, use_threads=False)
    place = dict(
        zip(groups, np.cumsum([0, *(sizes[group] for group in groups)]).tolist(), strict=False)
    )
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


def _samples(store: Store, table: pa.Table) -> Samples:
    columns = {name: table[name].to_pylist() for name in [*_WORDS, "shard"]}
    columns["faces"] = [
        _boxes(*row)
        for row in zip(*(columns[n] for n in ("faces", "width", "height")), strict=True)
    ]
    columns["unfused"] = [
        [f"{pair['region']}:{pair['reason']}" for pair in row] for row in columns["unfused"]
    ]
    columns["missing"] = _missing(metrics.label_matrix(table))
    rows = neighbours(store, columns["key"])
    found = [rows.get(key) for key in columns["key"]]
    for name in ("identity_id", "split"):
        columns[name] = [row[name] if row else "" for row in found]
    columns["nearest"] = [row["nearest"] if row else [] for row in found]
    columns["similarity"] = [
        [round(v, 3) for v in row["similarity"]] if row else [] for row in found
    ]
    extra = [
        [row["identity_size"] if row else np.nan for row in found],
        [_first(row) for row in found],
    ]
    pictures = list(zip(*(table[name].to_pylist() for name in _PICTURES), strict=True))
    return Samples(columns, np.concatenate([metrics.matrix(table), extra]), pictures)


def _boxes(faces: Sequence[Row], width: int, height: int) -> list[list[float]]:
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
    found: list[int] = np.where(np.isnan(labels).any(0), -1, bits).tolist()
    return found


def _first(row: Row | None) -> float:
    return row["similarity"][0] if row and row["similarity"] else np.nan
