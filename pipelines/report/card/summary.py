"""Facts: what a data set says of itself as a whole, read from manifests, sidecars, identities and
its own two files.

No clock, no host and no path is among them: equal outputs have equal facts, wherever they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from configs.aliases import rename_keys
from configs.schema import DatasetConfig
from pipelines.dedup.global_pass import read_identities
from stages.record import Status
from stages.storage.commit import Manifest, read_manifests, read_sidecar
from stages.storage.exclusions import IDENTITIES, read_takedowns
from stages.storage.store import Store

STATED: Final = ("license", "author", "consent")  # what a source states of a picture
_COLUMNS: Final = ("status", *STATED, "trainable")
_PRIVATE: Final = ("source", "weights")  # sections of the configuration that hold paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of the split."""

    samples: int
    identities: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """ended: (status, reason) → inputs. stated: for each of STATED, text → samples. untrainable: of
    those reviewed. torn: identities that stand on both sides of the split. identities: sha256 of
    identities.parquet, "" where there is none. takedowns: by → (times, inputs).
    """

    manifests: list[Manifest]
    inputs: int
    written: int
    ended: Counter[tuple[str, str]]
    stated: dict[str, Counter[str]]
    reviewed: int
    untrainable: int
    sides: dict[str, Side]
    torn: int
    identities: str
    takedowns: dict[str, tuple[int, int]]
    config: dict[str, Any]
    dataset: dict[str, Any]


def read_facts(store: Store) -> Facts:
    """Raises FileNotFoundError where a sidecar is missing."""
    found = read_manifests(store)
    manifests = list(found.values())
    ended = Counter[tuple[str, str]]()
    for manifest in manifests:
        for status in ("dropped", "failed"):
            ended.update({(status, reason): count for reason, count in manifest[status].items()})
    stated = {name: Counter[str]() for name in STATED}
    trainable = Counter[bool]()
    for index in found:
        table = read_sidecar(store, index, list(_COLUMNS))
        table = table.filter(pc.equal(table.column("status"), Status.OK.value))
        for name in STATED:
            stated[name].update(_counts(table.column(name)))
        trainable.update(_counts(table.column("trainable").drop_null()))
    people = read_identities(store)
    return Facts(
        manifests=manifests,
        inputs=sum(manifest["inputs"] for manifest in manifests),
        written=sum(manifest["written"] for manifest in manifests),
        ended=ended,
        stated=stated,
        reviewed=trainable.total(),
        untrainable=trainable[False],
        sides=_sides(people),
        torn=_torn(people),
        identities=_digest(store, IDENTITIES),
        takedowns=_takedowns(store),
        config={name: value for name, value in _config(store).items() if name not in _PRIVATE},
        dataset={name: value for name, value in _dataset(store).items() if name != "source"},
    )


def _counts(column: pa.ChunkedArray) -> dict[Any, int]:
    counts = pc.value_counts(column)
    return dict(
        zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    )


def _sides(people: pa.Table) -> dict[str, Side]:
    table = people.group_by("split").aggregate(
        [("key", "count"), ("identity_id", "count_distinct")]
    )
    rows = sorted(table.to_pylist(), key=lambda row: str(row["split"]))
    return {
        row["split"]: Side(samples=row["key_count"], identities=row["identity_id_count_distinct"])
        for row in rows
    }


def _torn(people: pa.Table) -> int:
    sides = (
        people.group_by("identity_id")
        .aggregate([("split", "count_distinct")])
        .column("split_count_distinct")
    )
    return cast(int, pc.sum(pc.greater(sides, 1)).as_py() or 0)


def _takedowns(store: Store) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for entry in read_takedowns(store):
        times, inputs = found.get(entry["by"], (0, 0))
        found[entry["by"]] = times + 1, inputs + entry["inputs"]
    return dict(sorted(found.items()))


def _digest(store: Store, name: str) -> str:
    if not store.exists(name):
        return ""
    with store.open(name) as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def _config(store: Store) -> dict[str, Any]:
    """The configuration as plain values, unchecked, under the current names of its keys: a card is
    written of older outputs too.
    """
    config = yaml.safe_load(store.read("config.yaml")) if store.exists("config.yaml") else {}
    return rename_keys(DatasetConfig, _mapping(config))


def _dataset(store: Store) -> dict[str, Any]:
    return _mapping(json.loads(store.read("dataset.json")) if store.exists("dataset.json") else {})


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
