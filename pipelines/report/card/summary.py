"""Summary: what a data set says of itself as a whole, for its README and its Croissant description.

No clock, no host and no path is part of it: equal outputs have equal summaries, wherever they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.stats import Report
from stages.fields import Column
from stages.storage import layout
from stages.storage.exclusions import read_takedowns
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

PROVENANCE: Final = ("license", "author", "consent")  # what a source states of a picture
_PRIVATE: Final = ("source", "weights")  # sections of the configuration that hold paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of the split: numbers of samples and identities."""

    samples: int
    identities: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """unwritten: (status, reason) → inputs. provenance: of each of PROVENANCE, text → samples.

    untrainable: samples of those reviewed. divided: number of identities on both sides of the split.
    identities: sha256 of identities.parquet, "" where there is none. takedowns: by → (times,
    inputs). columns: of the sidecars.
    """

    manifests: Sequence[Manifest]
    inputs: int
    written: int
    unwritten: Counter[tuple[str, str]]
    provenance: dict[str, Counter[str]]
    reviewed: int
    untrainable: int
    sides: dict[str, Side]
    divided: int
    identities: str
    takedowns: dict[str, tuple[int, int]]
    config: dict[str, Any]
    dataset: dict[str, Any]
    columns: Mapping[str, Column]


def summarise(reader: DatasetReader, report: Report) -> Summary:
    """The summary of a data set from its report, its identities and its own two files."""
    unwritten = Counter[tuple[str, str]]()
    for manifest in report.manifests:
        for status, reasons in (("dropped", manifest.dropped), ("failed", manifest.failed)):
            unwritten.update({(status, reason): count for reason, count in reasons.items()})
    provenance = {name: Counter[str]() for name in PROVENANCE}
    for key, count in report.tally.items():
        if key[0] in provenance:
            provenance[key[0]][key[1]] += count
    people = reader.identities(["key", "identity_id", "split"])
    untrainable = report.tally["trainable", "no"]
    return Summary(
        manifests=report.manifests,
        inputs=sum(manifest.inputs for manifest in report.manifests),
        written=sum(manifest.written for manifest in report.manifests),
        unwritten=unwritten,
        provenance=provenance,
        reviewed=untrainable + report.tally["trainable", "yes"],
        untrainable=untrainable,
        sides=_sides(people),
        divided=_divided(people),
        identities=_digest(reader.store, layout.IDENTITIES),
        takedowns=_takedowns(reader.store),
        config=_public(reader.config_values(), _PRIVATE),
        dataset=_public(reader.dataset_info(), ("source",)),
        columns=reader.columns(),
    )


def _public(values: Mapping[str, Any], private: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in private}


def _sides(people: pa.Table) -> dict[str, Side]:
    aggregates = [("key", "count"), ("identity_id", "count_distinct")]
    rows = people.group_by("split").aggregate(aggregates).to_pylist()
    rows.sort(key=lambda row: str(row["split"]))
    return {
        row["split"]: Side(samples=row["key_count"], identities=row["identity_id_count_distinct"])
        for row in rows
    }


def _divided(people: pa.Table) -> int:
    counts = people.group_by("identity_id").aggregate([("split", "count_distinct")])
    divided = pc.sum(pc.greater(counts.column("split_count_distinct"), 1)).as_py()
    return cast(int, divided or 0)


def _takedowns(store: Store) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for entry in read_takedowns(store):
        times, inputs = counts.get(entry["by"], (0, 0))
        counts[entry["by"]] = times + 1, inputs + entry["inputs"]
    return dict(sorted(counts.items()))


def _digest(store: Store, name: str) -> str:
    if not store.exists(name):
        return ""
    with store.open(name) as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
