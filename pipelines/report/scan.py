"""Scan: one pass over the sidecars, several shards at a time, reading the columns that figures are
made of.

Pictures, embeddings and words are not among them; those of the few samples that the page shows are
read afterwards (`samples.py`). What a shard leaves behind is a matrix of numbers and a tally.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import ShardError
from pipelines.report import metrics
from pipelines.report.distribution import Floats
from stages.record import Status
from stages.regions import REGION_WORDS
from stages.storage.commit import FOLDER
from stages.storage.store import Store

EXAMPLES: Final = 8  # rows noted for each reason
_THREADS: Final = 4
_ENDED: Final = (Status.DROPPED, Status.FAILED)
_LEDGER: Final = ["status", "stage", "reason"]
_TALLIED: Final = ["license", "consent", "trainable", "width", "height"]
_LISTS: Final = ["fused", "absent", "unfused"]
_COLUMNS: Final = [*_LEDGER, "tar_size", "held_size", *_TALLIED, *_LISTS, *metrics.COLUMNS]

Row = Mapping[str, Any]
End = tuple[str, str, str]  # status, stage, reason


@dataclass(frozen=True, slots=True)
class Scan:
    """What one sidecar says. values, labels: of the written samples, in their order."""

    manifest: Row
    index: int
    counts: dict[End, int]  # how many rows ended so; written ones under ("ok", "", "")
    first: dict[End, list[int]]  # numbers of the first rows that did
    tar_bytes: int
    held_bytes: int
    values: Floats  # (len(FIGURES), written)
    labels: Floats  # (19, written)
    # ("license", name), ("fused", region), ("unfused", region, reason), …
    tally: Counter[tuple[str, ...]]

    @property
    def name(self) -> str:
        return str(self.manifest["shard"])

    def of(self, status: str) -> int:
        return sum(count for end, count in self.counts.items() if end[0] == status)

    @property
    def inputs(self) -> int:
        return sum(self.counts.values())


def scan(store: Store, manifests: Sequence[Row]) -> Iterator[Scan]:
    """In the manifests' order. Raises ShardError for a shard whose sidecar is missing or
    contradicts its manifest.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda manifest: _scan(store, manifest), manifests)


@contextmanager
def open_sidecar(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """Raises ShardError if it is missing."""
    try:
        with store.parquet(f"{FOLDER}/{name}.parquet") as file:
            yield file
    except FileNotFoundError as error:
        raise ShardError(
            f"{store.url}: {name} has a manifest and no sidecar. Remove the manifest and run again."
        ) from error


def _scan(store: Store, manifest: Row) -> Scan:
    name = manifest["shard"]
    with open_sidecar(store, name) as file:
        names = set(file.schema_arrow.names)
        if absent := [column for column in _COLUMNS if column not in names]:
            raise ShardError(
                f"{name}: its sidecar has no column {', '.join(absent)}. Make it with this version."
            )
        table = file.read(_COLUMNS, use_threads=False).combine_chunks()
    counts, first = _ends(table)
    _check(manifest, counts)
    written = table.filter(pc.equal(table["status"], Status.OK.value))
    values, labels = metrics.matrix(written), metrics.label_matrix(written)
    return Scan(
        manifest=manifest,
        index=int(name.rpartition("-")[2]),
        counts=counts,
        first=first,
        tar_bytes=pc.sum(table["tar_size"]).as_py() or 0,
        held_bytes=pc.sum(table["held_size"]).as_py() or 0,
        values=values,
        labels=labels,
        tally=_tally(written, metrics.regions(labels)),
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


def _check(manifest: Row, counts: Mapping[End, int]) -> None:
    """Raises ShardError unless rows and manifest agree and the ledger balances."""
    if unknown := {status for status, _, _ in counts} - set(Status):
        raise ShardError(
            f"{manifest['shard']}: the sidecar has rows of status {', '.join(sorted(unknown))}"
        )
    by_reason: dict[str, Counter[str]] = {status.value: Counter() for status in _ENDED}
    written = 0
    for (status, _, reason), count in counts.items():
        if status == Status.OK:
            written += count
        else:
            by_reason[status][reason] += count
    stated = {name: manifest[name] for name in ("inputs", "written", "dropped", "failed")}
    measured = {
        "inputs": sum(counts.values()),
        "written": written,
        **{k: dict(v) for k, v in by_reason.items()},
    }
    if stated != measured:
        raise ShardError(
            f"the ledger of {manifest['shard']} doesn't balance: its manifest says {stated}, its "
            f"sidecar {measured}. "
            "Remove the manifest and run again."
        )


def _tally(written: pa.Table, areas: Floats) -> Counter[tuple[str, ...]]:
    tally: Counter[tuple[str, ...]] = Counter()
    for name in ("license", "consent"):
        tally.update({(name, value): count for value, count in _value_counts(written[name])})
    for value, count in _value_counts(written["trainable"]):
        tally["trainable", {True: "yes", False: "no", None: "unknown"}[value]] += count
    sizes = pc.add(
        pc.multiply(pc.cast(written["width"], pa.int64()), 1 << 32),
        pc.cast(written["height"], pa.int64()),
    )
    tally.update(
        {("size", str(v >> 32), str(v & 0xFFFFFFFF)): count for v, count in _value_counts(sizes)}
    )
    for name in ("fused", "absent"):
        tally.update(
            {(name, value): count for value, count in _value_counts(pc.list_flatten(written[name]))}
        )
    flat = pc.list_flatten(written["unfused"])
    if len(flat):
        both = pc.binary_join_element_wise(
            pc.struct_field(flat, "region"), pc.struct_field(flat, "reason"), "\t"
        )
        tally.update(
            {("unfused", *value.split("\t")): count for value, count in _value_counts(both)}
        )
    for word, area in zip(REGION_WORDS, areas, strict=True):
        tally["missing", word] = int((area == 0).sum())
    tally["parsed",] = int((~np.isnan(areas[0])).sum()) if len(areas) else 0
    return tally


def _value_counts(column: pa.ChunkedArray | pa.Array) -> Iterator[tuple[Any, int]]:
    for pair in pc.value_counts(column).to_pylist():
        yield pair["values"], pair["counts"]


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    encoded = column.combine_chunks().dictionary_encode()
    return encoded if isinstance(encoded, pa.DictionaryArray) else encoded.combine_chunks()
