"""Scan: one pass over the sidecars, several shards at a time, reading the columns of the report.

Pictures, embeddings and captions are not among them; those of the few samples that the page shows
are read afterwards (`samples.py`). A shard gives a matrix of numbers and a tally.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ShardError
from pipelines.report import metrics
from pipelines.report.distribution import Floats
from pipelines.report.metrics import ShownMetric
from stages.annotations import ABSENT, FUSED
from stages.fields import Column
from stages.record import Status
from stages.regions import REGION_WORDS
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader

EXAMPLES: Final = 8  # rows noted for each reason
_THREADS: Final = 4
_ENDED: Final = (Status.DROPPED, Status.FAILED)
_LEDGER: Final = ("status", "stage", "reason")
_NAMED: Final = ("license", "author", "consent")
_TALLIED: Final = (*_NAMED, "trainable", "width", "height", "regions")

End = tuple[str, str, str]  # status, stage, reason


@dataclass(frozen=True, slots=True)
class Scan:
    """What one sidecar says.

    counts: how many rows have this status, stage and reason; written ones are ("ok", "", "").
    first: numbers of the first such rows. values: (metrics, written). labels: (19, written). tally:
    counts of ("license", name), ("fused", region), ("unfused", region, reason) and so on.
    """

    manifest: Manifest
    counts: dict[End, int]
    first: dict[End, list[int]]
    tar_bytes: int
    quarantine_bytes: int
    values: Floats
    labels: Floats
    tally: Counter[tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.manifest.shard

    def of(self, status: str) -> int:
        return sum(count for end, count in self.counts.items() if end[0] == status)

    @property
    def inputs(self) -> int:
        return sum(self.counts.values())


def scan(
    reader: DatasetReader,
    manifests: Sequence[Manifest],
    shown: Sequence[ShownMetric],
    columns: Mapping[str, Column],
) -> Iterator[Scan]:
    """In the manifests' order. Raises ShardError for a shard whose sidecar is missing or
    contradicts its manifest.
    """
    names = [*_LEDGER, "tar_size", "quarantine_size", *_TALLIED]
    wanted: list[Column | str] = [*names, *metrics.columns_of(shown, columns)]

    def read(manifest: Manifest) -> Scan:
        with reader.sidecar(manifest.index) as file:
            if missing := [name for name in _LEDGER if name not in file.columns]:
                raise ShardError(
                    f"{manifest.shard}: its sidecar has no column {', '.join(missing)}. Remove its "
                    "manifest and run the pipeline again: it makes the shard again."
                )
            table = file.read(wanted).combine_chunks()
        return _scan(manifest, table, shown)

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(read, manifests)


def _scan(manifest: Manifest, table: pa.Table, shown: Sequence[ShownMetric]) -> Scan:
    counts, first = _ends(table)
    _check(manifest, counts)
    written = table.filter(pc.equal(table["status"], Status.OK.value))
    labels = metrics.label_matrix(written)
    return Scan(
        manifest=manifest,
        counts=counts,
        first=first,
        tar_bytes=pc.sum(table["tar_size"]).as_py() or 0,
        quarantine_bytes=pc.sum(table["quarantine_size"]).as_py() or 0,
        values=metrics.matrix(written, shown),
        labels=labels,
        tally=_tally(written, metrics.region_areas(labels)),
    )


def _ends(table: pa.Table) -> tuple[dict[End, int], dict[End, list[int]]]:
    """How often each (status, stage, reason) occurs, and where first; in the order of their first
    rows.
    """
    code = np.zeros(len(table), np.int64)
    columns = [_encoded(table[name]) for name in _LEDGER]
    for column in columns:
        code = code * max(1, len(column.dictionary)) + column.indices.to_numpy()
    counts: dict[End, int] = {}
    first: dict[End, list[int]] = {}
    found, starts = np.unique(code, return_index=True)
    for value, start in sorted(
        zip(found.tolist(), starts.tolist(), strict=True), key=lambda pair: pair[1]
    ):
        status, stage, reason = (column[start].as_py() for column in columns)
        rows = np.flatnonzero(code == value)
        counts[status, stage, reason] = len(rows)
        first[status, stage, reason] = rows[:EXAMPLES].tolist()
    return counts, first


def _check(manifest: Manifest, counts: Mapping[End, int]) -> None:
    """Raises ShardError unless rows and manifest agree and the ledger balances."""
    if unknown := {status for status, _, _ in counts} - set(Status):
        raise ShardError(
            f"{manifest.shard}: the sidecar has rows of status {', '.join(sorted(unknown))}"
        )
    by_reason: dict[str, Counter[str]] = {status.value: Counter() for status in _ENDED}
    written = 0
    for (status, _, reason), count in counts.items():
        if status == Status.OK:
            written += count
        else:
            by_reason[status][reason] += count
    stated = {
        "inputs": manifest.inputs,
        "written": manifest.written,
        "dropped": dict(manifest.dropped),
        "failed": dict(manifest.failed),
    }
    counted = {
        "inputs": sum(counts.values()),
        "written": written,
        **{status: dict(reasons) for status, reasons in by_reason.items()},
    }
    if stated != counted:
        raise ShardError(
            f"the ledger of {manifest.shard} doesn't balance: its manifest says {stated}, its "
            f"sidecar {counted}. Remove the manifest and run again."
        )


def _tally(written: pa.Table, areas: Floats) -> Counter[tuple[str, ...]]:
    tally: Counter[tuple[str, ...]] = Counter()
    for name in _NAMED:
        names = pc.fill_null(written[name], "")
        tally.update({(name, value): count for value, count in _value_counts(names)})
    for value, count in _value_counts(written["trainable"]):
        tally["trainable", {True: "yes", False: "no", None: "unknown"}[value]] += count
    width, height = (pc.cast(written[name], pa.int64()) for name in ("width", "height"))
    sizes = pc.add(pc.multiply(width, 1 << 32), height)
    for value, count in _value_counts(sizes):
        tally["size", str(value >> 32), str(value & 0xFFFFFFFF)] += count
    untrainable = written.filter(pc.fill_null(pc.equal(written["trainable"], False), False))
    for word, status, count in _region_statuses(written["regions"]):
        kind = {FUSED: (FUSED, word), ABSENT: (ABSENT, word)}.get(status, ("unfused", word, status))
        tally[kind] += count
    for _, status, count in _region_statuses(untrainable["regions"]):
        if status not in (FUSED, ABSENT):
            tally["untrainable_because", status] += count
    for word, area in zip(REGION_WORDS, areas, strict=True):
        tally["missing", word] = int((area == 0).sum())
    tally["parsed",] = int((~np.isnan(areas[0])).sum()) if len(areas) else 0
    return tally


def _region_statuses(column: pa.ChunkedArray) -> Iterator[tuple[str, str, int]]:
    """(region, status, count) of the statuses that are not empty."""
    reviewed = column.filter(pc.equal(pc.list_value_length(column), len(REGION_WORDS)))
    for place, word in enumerate(REGION_WORDS):
        for status, count in _value_counts(pc.list_element(reviewed, place)):
            if status:
                yield word, status, count


def _value_counts(column: pa.ChunkedArray | pa.Array) -> Iterator[tuple[Any, int]]:
    for pair in pc.value_counts(column).to_pylist():
        yield pair["values"], pair["counts"]


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    encoded = column.combine_chunks().dictionary_encode()
    return encoded if isinstance(encoded, pa.DictionaryArray) else encoded.combine_chunks()
