"""Exclusions: what is known of a record from outside its shard: it is a duplicate of a sample in
any shard, or its removal was requested.

Duplicates are in duplicates.parquet (written by the global pass), removals in takedown.jsonl. Only
`commit` applies them. A shard's bytes depend on its inputs, its signatures and its exclusions; its
manifest holds a digest of those that were applied, and a shard whose exclusions have changed is
written again from its own samples, without running a stage.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ShardError
from stages.base import Dropped, introduced_name, quarantine
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.store import Store

GLOBAL_PASS: Final = "global_pass"  # noqa: S105 - no password
"""`stage` of a record that the global pass dropped."""
TAKEDOWN: Final = "takedown"
"""`stage` of a removed record."""
TAKEN_DOWN: Final = "taken_down"
"""`reason` of a removed record."""

DUPLICATES_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("of", pa.string()),  # key of the sample that stays
        ("value", pa.float64()),  # bits of the hash that differ, or the cosine
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    stage: str
    reason: str
    detail: str

    @property
    def is_removal(self) -> bool:
        """True if nothing may be made of the input again."""
        return self.stage == TAKEDOWN


Exclusions = Mapping[str, Exclusion]  # by key


def apply(exclusion: Exclusion | None, record: Record) -> Record:
    """A duplicate that is ok gets quarantined; of a removed record only the key stays."""
    if exclusion is None:
        return record
    if exclusion.is_removal:
        return removed_record(record.key)
    if not record.ok:
        return record
    return quarantine(record, Dropped(exclusion.reason, exclusion.detail), exclusion.stage)


def restored(record: Record) -> Record:
    """The record as it was before it was quarantined as a duplicate; any other as it is."""
    if record.quarantined and record.stage == GLOBAL_PASS:
        return replace(record, status=Status.OK, reason="", detail="", stage="")
    return record


def removed_record(key: str) -> Record:
    """What is kept of a record whose removal was requested: neither its name nor its digest."""
    return Record(key=key, source="", status=Status.DROPPED, reason=TAKEN_DOWN, stage=TAKEDOWN)


def digest(exclusions: Exclusions) -> str:
    """Equal digests mean equal exclusions; "" for none. Stages count under the names they were
    introduced with, so that the digests of existing data sets stay valid."""
    if not exclusions:
        return ""
    entries = [
        (key, (introduced_name(each.stage), each.reason, each.detail))
        for key, each in sorted(exclusions.items())
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]


def of_shard(store: Store, index: int) -> Exclusions:
    """The exclusions on one shard's records."""
    duplicates: dict[str, Exclusion] = {}
    if store.exists(layout.DUPLICATES):
        table = store.table(layout.DUPLICATES)
        duplicates = _duplicates(table.filter(pc.equal(table.column("shard"), index))).get(
            index, {}
        )
    return duplicates | _removals(store).get(index, {})


def of_all(store: Store) -> dict[int, Exclusions]:
    """shard → the exclusions on its records, for shards that have any."""
    duplicates: dict[int, dict[str, Exclusion]] = {}
    if store.exists(layout.DUPLICATES):
        duplicates = _duplicates(store.table(layout.DUPLICATES))
    removals = _removals(store)
    shards = sorted({*duplicates, *removals})
    return {index: duplicates.get(index, {}) | removals.get(index, {}) for index in shards}


def read_takedowns(store: Store) -> list[dict[str, Any]]:
    """The log of removals, oldest first. Raises ShardError for a line that isn't an entry of it."""
    if not store.exists(layout.TAKEDOWNS):
        return []
    entries = []
    for number, line in enumerate(store.read(layout.TAKEDOWNS).decode().splitlines(), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            keys = [key for shard in entry["removed"].values() for key in shard]
            if entry["inputs"] != len(keys) or not {"time", "by", "note", "sha256"} <= {*entry}:
                raise ValueError(f"{len(keys)} keys for {entry['inputs']} inputs")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(
                f"{store.url}: line {number} of {layout.TAKEDOWNS} is not an entry of the removal "
                f"log ({error!r}). The log says what must stay out: restore it from a copy, don't "
                "delete it."
            ) from error
        entries.append(entry)
    return entries


def removed_digests(store: Store) -> frozenset[str]:
    """sha256 of removed pictures: they are refused under any name."""
    return frozenset(digest for entry in read_takedowns(store) for digest in entry["sha256"])


def removed_keys(store: Store) -> frozenset[str]:
    """Keys of all removed records."""
    entries = read_takedowns(store)
    return frozenset(key for e in entries for keys in e["removed"].values() for key in keys)


def _duplicates(table: pa.Table) -> dict[int, dict[str, Exclusion]]:
    by_shard: dict[int, dict[str, Exclusion]] = defaultdict(dict)
    for row in table.to_pylist():
        exclusion = Exclusion(stage=GLOBAL_PASS, reason=row["reason"], detail=row["detail"])
        by_shard[row["shard"]][row["key"]] = exclusion
    return by_shard


def _removals(store: Store) -> dict[int, dict[str, Exclusion]]:
    by_shard: dict[int, dict[str, Exclusion]] = defaultdict(dict)
    exclusion = Exclusion(stage=TAKEDOWN, reason=TAKEN_DOWN, detail="")
    for entry in read_takedowns(store):
        for shard, keys in entry["removed"].items():
            by_shard[layout.shard_index(shard)] |= dict.fromkeys(keys, exclusion)
    return by_shard
