"""Scan: one pass over all sidecars, several at a time, for the numbers of the report.

Thumbnails, embeddings and captions are not read. Those of the records that the page shows are read
afterwards (`page_records.py`).
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
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader

EXAMPLES: Final = 8  # of each reason
_THREADS: Final = 4
_UNWRITTEN: Final = (Status.DROPPED, Status.FAILED)
_OUTCOME: Final = ("status", "stage", "reason")
_PROVENANCE: Final = ("license", "author", "consent")
_TALLIED: Final = (*_PROVENANCE, "person", "trainable", "width", "height", "regions")

Outcome = tuple[str, str, str]  # status, stage, reason; of samples ("ok", "", "")


@dataclass(frozen=True, slots=True)
class Scan:
    """The numbers of one shard.

    counts: number of rows by outcome. examples: the first rows of each outcome, by their position.
    values: metrics of the samples (metrics, written). labels: their label areas (19, written).
    lacking: names of columns that other shards have, and its sidecar doesn't.
    tally: numbers of samples by ("license", name), ("fused", region), ("unfused", region, reason)
    and so on.
    """

    manifest: Manifest
    counts: dict[Outcome, int]
    examples: dict[Outcome, list[int]]
    tar_bytes: int
    quarantine_bytes: int
    values: Floats
    labels: Floats
    tally: Counter[tuple[str, ...]]
    lacking: frozenset[str]

    @property
    def name(self) -> str:
        return self.manifest.shard

    def of(self, status: str) -> int:
        """Number of rows with this status."""
        return sum(count for outcome, count in self.counts.items() if outcome[0] == status)

    @property
    def inputs(self) -> int:
        return sum(self.counts.values())


def scan(
    reader: DatasetReader,
    manifests: Sequence[Manifest],
    shown: Sequence[ShownMetric],
    columns: Mapping[str, Column],
) -> Iterator[Scan]:
    """The numbers of each shard, in the order of the manifests.

    Raises ShardError where a sidecar is missing, or contradicts its manifest.
    """
    names = [*_OUTCOME, "tar_size", "quarantine_size", *_TALLIED]
    wanted: list[Column | str] = [*names, *metrics.columns_of(shown, columns)]

    def read(manifest: Manifest) -> Scan:
        with reader.sidecar(manifest.index) as file:
            if missing := [name for name in _OUTCOME if name not in file.columns]:
                raise ShardError(
                    f"{manifest.shard}: its sidecar has no column {', '.join(missing)}. Remove its "
                    "manifest and run the pipeline again: it makes the shard again."
                )
            lacking = frozenset(columns.keys() - file.columns.keys())
            table = file.read(wanted).combine_chunks()
        return _scan(manifest, table, shown, lacking)

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(read, manifests)


def _scan(
    manifest: Manifest, table: pa.Table, shown: Sequence[ShownMetric], lacking: frozenset[str]
) -> Scan:
    counts, examples = _outcomes(table)
    _check(manifest, counts)
    written = table.filter(pc.equal(table["status"], Status.OK.value))
    labels = metrics.label_matrix(written)
    return Scan(
        manifest=manifest,
        counts=counts,
        examples=examples,
        tar_bytes=pc.sum(table["tar_size"]).as_py() or 0,
        quarantine_bytes=pc.sum(table["quarantine_size"]).as_py() or 0,
        values=metrics.matrix(written, shown),
        labels=labels,
        tally=_tally(written, metrics.region_areas(labels)),
        lacking=lacking,
    )


def _outcomes(table: pa.Table) -> tuple[dict[Outcome, int], dict[Outcome, list[int]]]:
    """(number of rows, first rows) of each outcome, in the order in which they first occur."""
    codes = np.zeros(len(table), np.int64)  # of each row: one number for its outcome
    columns = [_encoded(table[name]) for name in _OUTCOME]
    for column in columns:
        codes = codes * max(1, len(column.dictionary)) + column.indices.to_numpy()
    counts: dict[Outcome, int] = {}
    examples: dict[Outcome, list[int]] = {}
    distinct, starts = np.unique(codes, return_index=True)
    pairs = zip(starts.tolist(), distinct.tolist(), strict=True)
    for start, code in sorted(pairs):
        status, stage, reason = (column[start].as_py() for column in columns)
        rows = np.flatnonzero(codes == code)
        counts[status, stage, reason] = len(rows)
        examples[status, stage, reason] = rows[:EXAMPLES].tolist()
    return counts, examples


def _check(manifest: Manifest, counts: Mapping[Outcome, int]) -> None:
    """Raises ShardError unless the rows give the numbers that the manifest states."""
    repair = layout.how_to_repair(layout.sidecar(manifest.index))
    if unknown := {status for status, _, _ in counts} - set(Status):
        raise ShardError(
            f"{manifest.shard}: its sidecar has rows of status {', '.join(sorted(unknown))}, "
            f"expected {', '.join(Status)}. {repair}"
        )
    by_reason: dict[str, Counter[str]] = {status.value: Counter() for status in _UNWRITTEN}
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
            f"the ledger of {manifest.shard} doesn't balance: its manifest states {stated}, its "
            f"sidecar has {counted}. {repair}"
        )


def _tally(written: pa.Table, areas: Floats) -> Counter[tuple[str, ...]]:
    tally: Counter[tuple[str, ...]] = Counter()
    for name in _PROVENANCE:
        names = pc.fill_null(written[name], "")
        tally.update({(name, value): count for value, count in _value_counts(names)})
    # their number only: a person's name is in no summary
    tally["person_stated",] = pc.sum(pc.not_equal(written["person"], "")).as_py() or 0
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
    """(region, status, count) of Review.regions, without empty statuses."""
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
