"""Exclusions: records that are excluded for a cause outside their shard. They are duplicates of a
sample in any shard, or show a person who is blocked, or their removal was requested.

The first two are in duplicates.parquet (written by the global pass), removals in takedown.jsonl,
which also has the embeddings of blocked people and the releases of false matches with them. Only
`commit` applies them. A shard's bytes depend on its inputs, signatures and exclusions. Its manifest
holds a digest of the applied exclusions; a shard whose exclusions have changed is rewritten from
its own samples, without running a stage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ShardError
from stages.base import Dropped, introduced_name, quarantine
from stages.record import IDENTITY_DIM, FloatArray, Record, Status
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.store import Store

# `stage` of a record that the global pass dropped
GLOBAL_PASS: Final = "global_pass"  # noqa: S105 - not a password
TAKEDOWN: Final = "takedown"  # `stage` of a removed record
TAKEN_DOWN: Final = "taken_down"  # `reason` of a removed record
BLOCKED: Final = "blocked_person"  # `reason` of a record that shows a blocked person
RELEASE: Final = "release"  # `by` of an entry that isn't a removal, but releases blocked records

DUPLICATES_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("of", pa.string()),  # key of the sample that is not excluded; "": blocked_person
        ("value", pa.float64()),  # number of different bits of the hashes, or the cosine
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """Why a record is excluded; the values become those of the record."""

    stage: str
    reason: str
    detail: str

    @property
    def is_removal(self) -> bool:
        """True if the input must never be processed again."""
        return self.stage == TAKEDOWN


Exclusions = Mapping[str, Exclusion]  # by key


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedPerson:
    """A person of whom no picture may become a sample.

    vectors: float32 (Q, 512), embeddings of the photographs of the request. cosine: a face matches
    from this on. embedder: signature of the stage `embed` that made them. released: sha256 of
    images that were matched wrongly, and are not to be blocked.
    """

    vectors: FloatArray
    cosine: float
    embedder: str
    released: frozenset[str]


def encode_vectors(vectors: FloatArray) -> str:
    """Returns float32 (Q, 512) as the text that the log keeps."""
    return base64.b64encode(np.asarray(vectors, "<f4").tobytes()).decode()


def apply(exclusion: Exclusion | None, record: Record) -> Record:
    """Returns the record with its exclusion: a duplicate that is ok is quarantined, and a removed
    record keeps only its key.
    """
    if exclusion is None:
        return record
    if exclusion.is_removal:
        return removed_record(record.key)
    if not record.ok:
        return record
    return quarantine(record, Dropped(exclusion.reason, exclusion.detail), exclusion.stage)


def restored(record: Record) -> Record:
    """Returns the record as it was before it was quarantined as a duplicate. Other records are
    returned unchanged.
    """
    if record.quarantined and record.stage == GLOBAL_PASS:
        return replace(record, status=Status.OK, reason="", detail="", stage="")
    return record


def removed_record(key: str) -> Record:
    """Returns the record that replaces a removed one: it has a key, and neither name nor digest."""
    return Record(key=key, source="", status=Status.DROPPED, reason=TAKEN_DOWN, stage=TAKEDOWN)


def digest(exclusions: Exclusions) -> str:
    """Returns a digest: equal digests mean equal exclusions; "" means none.

    It hashes the names that stages were introduced with, so that existing digests stay valid.
    """
    if not exclusions:
        return ""
    entries = [
        (key, (introduced_name(each.stage), each.reason, each.detail))
        for key, each in sorted(exclusions.items())
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]


def of_shard(store: Store, index: int) -> Exclusions:
    """Returns the exclusions of one shard's records."""
    duplicates: dict[str, Exclusion] = {}
    if store.exists(layout.DUPLICATES):
        table = store.table(layout.DUPLICATES)
        duplicates = _duplicates(table.filter(pc.equal(table.column("shard"), index))).get(
            index, {}
        )
    return duplicates | _removals(store).get(index, {})


def of_all(store: Store) -> dict[int, Exclusions]:
    """Returns shard number → its exclusions, for shards that have any."""
    duplicates: dict[int, dict[str, Exclusion]] = {}
    if store.exists(layout.DUPLICATES):
        duplicates = _duplicates(store.table(layout.DUPLICATES))
    removals = _removals(store)
    shards = sorted({*duplicates, *removals})
    return {index: duplicates.get(index, {}) | removals.get(index, {}) for index in shards}


def read_takedowns(store: Store) -> list[dict[str, Any]]:
    """Returns the entries of removal requests in the log, oldest first. Raises ShardError for a
    line that isn't an entry.
    """
    return [entry for entry in _read_log(store) if entry["by"] != RELEASE]


def _read_log(store: Store) -> list[dict[str, Any]]:
    if not store.exists(layout.TAKEDOWNS):
        return []
    entries = []
    for number, line in enumerate(store.read(layout.TAKEDOWNS).splitlines(), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            _check_entry(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(
                f"{store.url}: line {number} of {layout.TAKEDOWNS} is not an entry of the removal "
                f"log ({type(error).__name__}: {error}). Without the log, removed inputs would be "
                "processed again: restore it from a copy, don't delete it."
            ) from error
        entries.append(entry)
    return entries


def _check_entry(entry: dict[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError unless it is an entry of the log."""
    if entry["by"] == RELEASE:
        _check_texts(entry["released"])
        return
    _check_texts([entry["time"], entry["by"], entry["note"], *entry["removed"]])
    for texts in (*entry["removed"].values(), entry["sha256"]):
        _check_texts(texts)
    if entry["inputs"] != (count := sum(map(len, entry["removed"].values()))):
        raise ValueError(f"{count} keys for {entry['inputs']} inputs")
    if (photo := entry.get("photo")) is not None:
        _check_texts([photo["embedder"], photo["weights"]])
        if not (math.isfinite(photo["cosine"]) and math.isfinite(photo["photos"])):
            raise ValueError("cosine and number of photographs are not numbers")
    if "block" in entry:
        _block_vectors(entry)
        if not photo or not photo["embedder"]:
            raise ValueError("a blocked person without cosine or embedder")


def _check_texts(values: object) -> None:
    """Raises TypeError unless it is a list of strings."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of strings, not {str(values)[:80]}")


def _block_vectors(entry: Mapping[str, Any]) -> FloatArray:
    data = base64.b64decode(entry["block"], validate=True)
    vectors = np.frombuffer(data, "<f4").reshape(-1, IDENTITY_DIM)
    if not len(vectors) or not np.isfinite(vectors).all():
        raise ValueError("a blocked person has no embedding, or one with NaN or infinity")
    return np.asarray(vectors, np.float32)


def blocked_people(store: Store) -> list[BlockedPerson]:
    """Returns the people who are blocked, the oldest request first. A release counts for the
    requests before it.
    """
    people = []
    entries = _read_log(store)
    for place, entry in enumerate(entries):
        if "block" not in entry:
            continue
        later = [each["released"] for each in entries[place:] if each["by"] == RELEASE]
        people.append(
            BlockedPerson(
                vectors=_block_vectors(entry),
                cosine=entry["photo"]["cosine"],
                embedder=entry["photo"]["embedder"],
                released=frozenset(digest for digests in later for digest in digests),
            )
        )
    return people


def check_log(store: Store, manifests: Iterable[Manifest]) -> None:
    """Raises ShardError if shards have removed records, but there is no removal log. manifests: all
    that can be read; of other shards, the sidecar says whether it has removed records.
    """
    manifests = [*manifests]
    shards = [manifest.shard for manifest in manifests if TAKEN_DOWN in manifest.dropped]
    shards = shards or _with_removed_rows(store, {manifest.index for manifest in manifests})
    if shards and not read_takedowns(store):
        raise ShardError(
            f"{store.url}/{layout.TAKEDOWNS} is missing or empty, but {shards[0]} has removed "
            "records. Without the log, removed inputs would be processed again: restore it from a "
            "copy."
        )


def _with_removed_rows(store: Store, committed: Set[int]) -> list[str]:
    """Returns the names of shards that aren't committed and whose sidecars have removed records."""
    names = []
    for name in store.names(layout.SHARDS):
        index = layout.index_of_sidecar(name)
        if index is None or index in committed:
            continue
        with suppress(ShardError, FileNotFoundError):  # it is damaged: nothing is kept of it
            reasons = store.table(layout.in_shards(name), ["reason"]).column("reason")
            if TAKEN_DOWN in reasons.to_pylist():
                names.append(layout.shard_name(index))
    return names


def removed_digests(store: Store) -> frozenset[str]:
    """Returns the sha256 of all removed images; such images are refused under any name."""
    return frozenset(digest for entry in read_takedowns(store) for digest in entry["sha256"])


def removed_keys(store: Store) -> frozenset[str]:
    """Returns the keys of all removed records."""
    entries = read_takedowns(store)
    return frozenset(key for e in entries for keys in e["removed"].values() for key in keys)


def _duplicates(table: pa.Table) -> dict[int, dict[str, Exclusion]]:
    """Returns shard number → key → exclusion, from a table of DUPLICATES_SCHEMA."""
    by_shard: dict[int, dict[str, Exclusion]] = defaultdict(dict)
    for row in table.to_pylist():
        exclusion = Exclusion(stage=GLOBAL_PASS, reason=row["reason"], detail=row["detail"])
        by_shard[row["shard"]][row["key"]] = exclusion
    return by_shard


def _removals(store: Store) -> dict[int, dict[str, Exclusion]]:
    """Returns shard number → key → exclusion, from the removal log."""
    by_shard: dict[int, dict[str, Exclusion]] = defaultdict(dict)
    exclusion = Exclusion(stage=TAKEDOWN, reason=TAKEN_DOWN, detail="")
    for entry in read_takedowns(store):
        for shard, keys in entry["removed"].items():
            by_shard[layout.shard_index(shard)] |= dict.fromkeys(keys, exclusion)
    return by_shard
