"""Exclusions: what is known of a record from outside its shard, that it is a copy of another or was
taken down.

They stand in the output, by shard: copies in `duplicates.parquet` (pipelines/neighbours),
take-downs in `takedown.jsonl`. A shard's bytes depend on its inputs, its signatures, and these; its
manifest holds a digest of those that were carried out, so that a shard whose exclusions have changed
is written again, without a stage at work.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ShardError
from stages.base import Dropped, quarantine
from stages.record import Record, Status
from stages.storage.store import Store

DUPLICATES: Final = "duplicates.parquet"
IDENTITIES: Final = "identities.parquet"
TAKEDOWN: Final = "takedown.jsonl"
NEIGHBOURS_STAGE: Final = "neighbours"
TAKEDOWN_STAGE: Final = "takedown"
TAKEN_DOWN: Final = "taken_down"

DUPLICATES_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("of", pa.string()),  # the key of the sample that stays
        ("figure", pa.float64()),  # bits of the hash that differ, or the cosine
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    stage: str
    reason: str
    detail: str

    @property
    def final(self) -> bool:
        """True if nothing may be made of the input again."""
        return self.stage == TAKEDOWN_STAGE


Exclusions = Mapping[str, Exclusion]  # key → exclusion
NONE: Final[Exclusions] = {}


def apply(exclusion: Exclusion | None, record: Record) -> Record:
    """The record as its exclusion has it: a copy is held, where it is ok; of one taken down just the
    key is left.
    """
    if exclusion is None:
        return record
    if exclusion.final:
        return removed_record(record.key)
    return (
        quarantine(record, Dropped(exclusion.reason, exclusion.detail), exclusion.stage)
        if record.ok
        else record
    )


def restored(record: Record) -> Record:
    """The record as it was before it was held as a copy; any other as it is."""
    if record.quarantined and record.stage == NEIGHBOURS_STAGE:
        return replace(record, status=Status.OK, reason="", detail="", stage="")
    return record


def removed_record(key: str) -> Record:
    """What stands in the place of a record that was taken down: not its name, nor its digest."""
    return Record(
        key=key, source="", status=Status.DROPPED, reason=TAKEN_DOWN, stage=TAKEDOWN_STAGE
    )


def digest(exclusions: Exclusions) -> str:
    """Equal digests mean equal exclusions; "" for none."""
    if not exclusions:
        return ""
    text = json.dumps([(key, astuple(exclusion)) for key, exclusion in sorted(exclusions.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def of_shard(store: Store, index: int) -> Exclusions:
    """The exclusions on one shard's records."""
    found: dict[str, Exclusion] = {}
    if store.exists(DUPLICATES):
        table = store.table(DUPLICATES)
        found = _copies(table.filter(pc.equal(table.column("shard"), index))).get(index, {})
    return found | _taken_down(store).get(index, {})


def of_all(store: Store) -> dict[int, Exclusions]:
    """shard → the exclusions on its records, for shards that have any."""
    copies: dict[int, dict[str, Exclusion]] = {}
    if store.exists(DUPLICATES):
        copies = _copies(store.table(DUPLICATES))
    taken = _taken_down(store)
    return {
        index: copies.get(index, {}) | taken.get(index, {}) for index in sorted({*copies, *taken})
    }


def read_takedowns(store: Store) -> list[dict[str, Any]]:
    """The audit log, oldest first. Raises ShardError for a line that isn't one of it."""
    if not store.exists(TAKEDOWN):
        return []
    entries = []
    for number, line in enumerate(store.read(TAKEDOWN).decode().splitlines(), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            keys = [key for shard in entry["removed"].values() for key in shard]
            if entry["inputs"] != len(keys) or not {"time", "by", "note", "sha256"} <= {*entry}:
                raise ValueError(f"{len(keys)} keys for {entry['inputs']} inputs")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(
                f"{store.url}: line {number} of {TAKEDOWN} is no take-down ({error!r}). It says "
                "what must stay out: "
                "mend it from a copy, don't delete it."
            ) from error
        entries.append(entry)
    return entries


def taken_digests(store: Store) -> frozenset[str]:
    """sha256 of pictures that were taken down: under whatever name they come again, nothing is made
    of them.
    """
    return frozenset(digest for entry in read_takedowns(store) for digest in entry["sha256"])


def _copies(table: pa.Table) -> dict[int, dict[str, Exclusion]]:
    found: dict[int, dict[str, Exclusion]] = defaultdict(dict)
    for row in table.to_pylist():
        found[row["shard"]][row["key"]] = Exclusion(
            stage=NEIGHBOURS_STAGE, reason=row["reason"], detail=row["detail"]
        )
    return found


def _taken_down(store: Store) -> dict[int, dict[str, Exclusion]]:
    found: dict[int, dict[str, Exclusion]] = defaultdict(dict)
    exclusion = Exclusion(stage=TAKEDOWN_STAGE, reason=TAKEN_DOWN, detail="")
    for entry in read_takedowns(store):
        for shard, keys in entry["removed"].items():
            found[int(shard.rpartition("-")[2])] |= dict.fromkeys(keys, exclusion)
    return found
