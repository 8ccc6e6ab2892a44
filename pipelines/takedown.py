"""Take-down: removes images, or all images of a person, from a data set, and logs it.

The log (takedown.jsonl) is written first: it states which inputs must never be processed again. It
contains keys and digests, but no names of files or people. Then the shards with removed records are
rewritten. A row with the key remains in the sidecar, so that the ledger still adds up. The same
files are refused under any name while the log exists. plan.parquet still has their names, since the
source still lists them: delete them from the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import FaceError, PipelineError, ShardError, SourceError
from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.dedup.global_pass import apply_exclusions, run_global_pass
from stages.base import run_chain
from stages.chain import build_stages
from stages.record import IDENTITY_DIM, FloatArray, Record, Status, key_of
from stages.storage import exclusions, layout
from stages.storage.commit import ChainInfo, remove_uncommitted
from stages.storage.exclusions import TAKEN_DOWN
from stages.storage.lock import RunLock
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import SidecarFile
from stages.storage.store import Store

By = Literal["source", "hash", "photo"]

_PHOTO_STAGES: Final = ("resize", "detect", "embed")
_PERSONAL: Final = ("source", "sha256", "thumbnail", "identity", "caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A record to remove. why: how it was matched, for the user who confirms; it is not stored."""

    shard: int
    key: str
    source: str
    sha256: str
    why: str


def by_source(store: Store, pattern: str) -> list[Match]:
    """Returns the records whose source is `pattern` or matches it; * and ? are wildcards."""

    def why(row: Mapping[str, Any]) -> str:
        matches = row["source"] == pattern or fnmatchcase(row["source"], pattern)
        return pattern if matches else ""

    return _with_duplicates(store, why)


def by_hash(store: Store, sha256: str) -> list[Match]:
    """Returns the records of the image file with this digest."""
    return _with_duplicates(store, lambda row: "digest" if row["sha256"] == sha256 else "")


def by_photo(
    store: Store, config: DatasetConfig, photo: Path, min_similarity: float
) -> list[Match]:
    """Returns the records whose embedding has a cosine of at least `min_similarity` with that of
    the largest face in a photograph, and all other records of their identities.

    Raises SourceError for a missing photograph, FaceError for one without a usable face.
    """
    reader = DatasetReader(store)
    query = _identity_of(config, photo)
    rows = reader.identities(["key", "identity_id"]).to_pylist()
    identity_ids = {row["key"]: row["identity_id"] for row in rows}
    cosines = dict[str, float]()
    for index in reader.manifests():
        table = reader.rows(index, ("key", "identity"))
        table = table.filter(pc.is_valid(table.column("identity")))
        vectors = table.column("identity").combine_chunks().flatten()
        matrix = vectors.to_numpy(zero_copy_only=False).reshape(-1, IDENTITY_DIM)
        keys = table.column("key").to_pylist()
        cosines |= zip(keys, (matrix @ query).tolist(), strict=True)
    similar = {key for key, cosine in cosines.items() if cosine >= min_similarity}
    matched_ids = {identity_ids[key] for key in similar if key in identity_ids}

    def why(row: Mapping[str, Any]) -> str:
        key = row["key"]
        cosine = cosines.get(key, -1.0)
        if key in similar:
            return f"cosine {cosine:.3f}"
        if identity_ids.get(key) in matched_ids:
            return f"identity {identity_ids[key]}, cosine {cosine:.3f}"
        return ""

    return _with_duplicates(store, why)


def take_down(
    store: Store,
    config: DatasetConfig,
    matches: Sequence[Match],
    by: By,
    note: str,
    chain: Chain = build_chain,
) -> list[str]:
    """Removes `matches` from the data set. Returns the names of the shards that had them.

    If it is stopped, the same call or the next run completes it. by, note: for the log.
    """
    info = ChainInfo.of(chain(config))
    with RunLock(store):
        store.sweep(layout.SHARDS)
        store.sweep(spare=layout.LOCK)  # another run may be writing its lock file now
        exclusions.check_log(store, DatasetReader(store).manifests().values())
        remove_uncommitted(store)
        removed: dict[str, list[str]] = {}
        for match in matches:
            removed.setdefault(layout.shard_name(match.shard), []).append(match.key)
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": by,
            "inputs": len(matches),
            "shards": sorted(removed),
            "removed": removed,
            "sha256": sorted({match.sha256 for match in matches} - {""}),
            "note": note,
        }
        exists = store.exists(layout.TAKEDOWNS)
        log = store.read(layout.TAKEDOWNS).decode() if exists else ""
        store.write(layout.TAKEDOWNS, log + json.dumps(entry, ensure_ascii=False) + "\n")
        apply_exclusions(store, info)
        run_global_pass(store, config.global_pass, info)
    return sorted(removed)


@dataclass(frozen=True, slots=True)
class Removals:
    """Keys and digests of all removed images."""

    keys: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()

    @staticmethod
    def of(store: Store) -> Removals:
        return Removals(exclusions.removed_keys(store), exclusions.removed_digests(store))

    def rows_left(self, shard: str, sidecar: SidecarFile) -> Iterator[str]:
        """Yields a line for each row of a sidecar with data of a removed image."""
        if not self.keys:
            return
        columns = ("key", "reason", *_PERSONAL, "tar_offset", "quarantine_offset")
        table = sidecar.read(columns)
        by_key = pc.is_in(table.column("key"), pa.array(self.keys, pa.string()))
        by_digest = pc.is_in(table.column("sha256"), pa.array(self.digests, pa.string()))
        for row in table.filter(pc.or_(by_key, by_digest)).to_pylist():
            in_tar = max(row["tar_offset"], row["quarantine_offset"]) >= 0
            personal = in_tar or any(row[name] for name in _PERSONAL)
            if row["sha256"] in self.digests:
                yield f"{shard}: {row['key']} has the digest of a removed image"
            elif personal or row["reason"] != TAKEN_DOWN:
                yield f"{shard}: {row['key']} was taken down, but its row still has data"


def lint_removals(store: Store, keys: Set[str]) -> Iterator[str]:
    """Yields a line for each row of identities.parquet with a removed key."""
    if not keys:
        return
    for row in DatasetReader(store).identities(["key", "nearest"]).to_pylist():
        if keys & {row["key"], *row["nearest"]}:
            yield f"{layout.IDENTITIES}: the row of {row['key']} has a key that was taken down"


def _with_duplicates(store: Store, why: Callable[[Mapping[str, Any]], str]) -> list[Match]:
    """Returns the records for which `why` returns a text, and the duplicates of these."""
    reader = DatasetReader(store)
    rows = [
        {"shard": index, **row}
        for index in reader.manifests()
        for row in reader.rows(index, ("key", "source", "sha256", "reason")).to_pylist()
        if row["reason"] != TAKEN_DOWN
    ]
    reasons = {row["key"]: reason for row in rows if (reason := why(row))}
    originals = _originals(store)
    count = -1
    while len(reasons) != count:  # copies of copies too
        count = len(reasons)
        digests = {row["sha256"] for row in rows if row["key"] in reasons} - {""}
        reasons |= {
            row["key"]: "a copy of one of these"
            for row in rows
            if row["key"] not in reasons
            and (originals.get(row["key"]) in reasons or row["sha256"] in digests)
        }
    return [
        Match(
            **{name: row[name] for name in ("shard", "key", "source", "sha256")},
            why=reasons[row["key"]],
        )
        for row in rows
        if row["key"] in reasons
    ]


def _originals(store: Store) -> dict[str, str]:
    """Returns key → key of its original, for all exact copies and other duplicates. Raises
    ShardError if the table of either is missing or damaged.
    """
    copies: pa.Table
    rows: list[Mapping[str, Any]] = []
    try:
        plan = store.table(layout.PLAN, ["key", "duplicate_of"])
        copies = plan.filter(pc.not_equal(plan.column("duplicate_of"), ""))
        # without both tables, the global pass hasn't run yet
        if store.exists(layout.DUPLICATES) or store.exists(layout.IDENTITIES):
            rows = store.table(layout.DUPLICATES, ["key", "of"]).to_pylist()
    except FileNotFoundError as error:
        name = layout.DUPLICATES if layout.DUPLICATES in str(error) else layout.PLAN
        raise ShardError(
            f"{store.url}/{name} is missing, so copies of the images to remove can't be found. "
            f"{layout.how_to_repair(name, missing=True)}"
        ) from error
    originals = {row["key"]: key_of(row["duplicate_of"]) for row in copies.to_pylist()}
    return originals | {row["key"]: row["of"] for row in rows}


def _identity_of(config: DatasetConfig, photo: Path) -> FloatArray:
    """Returns float32[512], the embedding of the largest face in a photograph."""
    if not photo.is_file():
        raise SourceError(f"no photograph at {photo}. Give the path of an image of the person.")
    data = photo.read_bytes()
    record = Record(
        key=key_of(photo.name),
        source=photo.name,
        image=data,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    [record] = run_chain(
        [stage for stage in build_stages(config) if stage.name in _PHOTO_STAGES], [record]
    )
    if record.status is not Status.OK or record.identity is None:
        raise FaceError(
            f"{photo}: {record.reason.replace('_', ' ')} ({record.detail}). Give a photograph "
            "that shows the person's face from the front."
        )
    return record.identity


def digest_of(text: str) -> str:
    """Returns `text` if it is a sha256, else the sha256 of the file with this path. Raises
    PipelineError if it is neither.
    """
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text.lower()):
        return text.lower()
    if Path(text).is_file():
        with Path(text).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    raise PipelineError(
        f"--hash {text!r}: expected a sha256 (64 hex digits) or the path of a file."
    )
