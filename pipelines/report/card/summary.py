"""Summary: the numbers and settings of a data set that README.md and croissant.json show.

Times, hosts and paths are not part of it, so equal data sets have equal summaries.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc

from configs.aliases import rename_keys
from configs.schema import DatasetConfig
from pipelines.report.stats import Report
from stages.fields import Column
from stages.storage import layout
from stages.storage.exclusions import read_takedowns
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

PROVENANCE: Final = ("license", "author", "consent")  # what a source states of an image
_PRIVATE: Final = ("source", "weights")  # sections of the configuration that hold paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of the split: numbers of samples and identities."""

    samples: int
    identities: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What README.md and croissant.json show.

    unwritten: (status, reason) → inputs. provenance: for each of PROVENANCE, text → samples.
    with_person: samples whose person the source states. reviewed: samples with a review;
    untrainable: those of them that are not trainable. sides: by name of the split's side. divided:
    identities on both sides. identities: sha256 of identities.parquet, "" without one. takedowns:
    kind of request → (requests, inputs). config, dataset: values of config.yaml and dataset.json,
    without paths. columns: of the sidecars. lacking: names of columns that some shards don't have.
    """

    manifests: Sequence[Manifest]
    inputs: int
    written: int
    unwritten: Counter[tuple[str, str]]
    provenance: dict[str, Counter[str]]
    with_person: int
    reviewed: int
    untrainable: int
    sides: dict[str, Side]
    divided: int
    identities: str
    takedowns: dict[str, tuple[int, int]]
    config: dict[str, Any]
    dataset: dict[str, Any]
    columns: Mapping[str, Column]
    lacking: frozenset[str]


def summarise(reader: DatasetReader, report: Report) -> Summary:
    """The summary of a data set. report: of the same data set."""
    unwritten = Counter[tuple[str, str]]()
    for manifest in report.manifests:
        for status, reasons in (("dropped", manifest.dropped), ("failed", manifest.failed)):
            unwritten.update({(status, reason): count for reason, count in reasons.items()})
    provenance = {name: Counter[str]() for name in PROVENANCE}
    for key, count in report.tally.items():
        if key[0] in provenance:
            provenance[key[0]][key[1]] += count
    identities = reader.identities(["key", "identity_id", "split"])
    untrainable = report.tally["trainable", "no"]
    return Summary(
        manifests=report.manifests,
        inputs=sum(manifest.inputs for manifest in report.manifests),
        written=sum(manifest.written for manifest in report.manifests),
        unwritten=unwritten,
        provenance=provenance,
        with_person=report.tally["person_stated",],
        reviewed=untrainable + report.tally["trainable", "yes"],
        untrainable=untrainable,
        sides=_sides(identities),
        divided=_divided(identities),
        identities=_digest(reader.store, layout.IDENTITIES),
        takedowns=_takedowns(reader.store),
        config=_public(rename_keys(DatasetConfig, reader.config_values()), _PRIVATE),
        dataset=_public(reader.dataset_info(), ("source", "passed_over")),
        columns=reader.columns(),
        lacking=report.lacking,
    )


def _public(values: Mapping[str, Any], private: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in private}


def _sides(identities: pa.Table) -> dict[str, Side]:
    aggregates = [("key", "count"), ("identity_id", "count_distinct")]
    rows = identities.group_by("split").aggregate(aggregates).to_pylist()
    rows.sort(key=lambda row: str(row["split"]))
    return {
        row["split"]: Side(samples=row["key_count"], identities=row["identity_id_count_distinct"])
        for row in rows
    }


def _divided(identities: pa.Table) -> int:
    """Number of identities with samples on both sides of the split."""
    counts = identities.group_by("identity_id").aggregate([("split", "count_distinct")])
    divided = pc.sum(pc.greater(counts.column("split_count_distinct"), 1)).as_py()
    return cast(int, divided or 0)


def _takedowns(store: Store) -> dict[str, tuple[int, int]]:
    """Kind of request (the `by` of the log) → (requests, inputs)."""
    counts: dict[str, tuple[int, int]] = {}
    for entry in read_takedowns(store):
        requests, inputs = counts.get(entry["by"], (0, 0))
        counts[entry["by"]] = requests + 1, inputs + entry["inputs"]
    return dict(sorted(counts.items()))


def _digest(store: Store, name: str) -> str:
    """sha256 of a file, "" where it doesn't exist."""
    if not store.exists(name):
        return ""
    with store.open(name) as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
