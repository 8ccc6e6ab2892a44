"""Take-down: pictures, or a person, are removed for good, and the log says so.

The log (`takedown.jsonl`) is written first, and is what counts: it names keys and digests, never a
file or a person. Then just those shards are written again that hold any of it; a row stays in each
sidecar, so that the ledger balances, but nothing in it says whose it was. The same pictures are
refused under any name for as long as the log stands. Plans keep the names of files, since the
source still lists them: take them away there.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow.compute as pc

from configs.errors import FaceError, PipelineError, SourceError
from configs.schema import DatasetConfig
from pipelines.dedup.global_pass import apply_exclusions, read_identities, run_global_pass
from pipelines.planning.plan import PLAN
from stages.base import run_chain
from stages.chain import build_stages
from stages.record import IDENTITY_DIM, FloatArray, Record, Status, key_of
from stages.storage import exclusions
from stages.storage.commit import FOLDER, read_manifests, read_sidecar, shard_name
from stages.storage.exclusions import TAKEDOWN, TAKEN_DOWN
from stages.storage.lock import RunLock
from stages.storage.store import Store

By = Literal["source", "hash", "photo"]

_PHOTO_STAGES: Final = ("resize", "detect", "embed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A record to be taken down. why: what it was found by, for the person who confirms it; not
    kept.
    """

    shard: int
    key: str
    source: str
    sha256: str
    why: str


def by_source(store: Store, pattern: str) -> list[Match]:
    """Records whose source is `pattern`, or matches it where it holds * or ?."""
    return _with_copies(
        store,
        lambda row: (
            pattern if row["source"] == pattern or fnmatchcase(row["source"], pattern) else ""
        ),
    )


def by_hash(store: Store, sha256: str) -> list[Match]:
    """Records of the picture with this digest."""
    return _with_copies(store, lambda row: "digest" if row["sha256"] == sha256 else "")


def by_photo(store: Store, config: DatasetConfig, photo: Path, least: float) -> list[Match]:
    """Records whose face is at least `least` alike (cosine) to the largest face in a photograph,
    and all others of the identities that these belong to. Raises SourceError or FaceError for a
    photograph that can't be used.
    """
    identity = _identity_of(config, photo)
    people = {row["key"]: row["identity_id"] for row in read_identities(store).to_pylist()}
    alike = dict[str, float]()
    for index in read_manifests(store):
        table = read_sidecar(store, index, ["key", "identity"])
        table = table.filter(pc.is_valid(table.column("identity")))
        vectors = table.column("identity").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        cosines = vectors.reshape(-1, IDENTITY_DIM) @ identity
        alike |= zip(table.column("key").to_pylist(), cosines.tolist(), strict=True)
    found = {people[key] for key, cosine in alike.items() if cosine >= least and key in people}

    def why(row: dict[str, Any]) -> str:
        cosine = alike.get(row["key"], -1.0)
        if cosine >= least:
            return f"cosine {cosine:.3f}"
        return (
            f"identity {people[row['key']]}, cosine {cosine:.3f}"
            if people.get(row["key"]) in found
            else ""
        )

    return _with_copies(store, why)


def take_down(
    store: Store, config: DatasetConfig, matches: Sequence[Match], by: By, note: str
) -> list[str]:
    """Remove `matches`; the names of the shards that were written again. Killed at any point, the
    same call, or the next run, carries it through.
    """
    with RunLock(store):
        store.sweep(FOLDER)
        removed: dict[str, list[str]] = {}
        for match in matches:
            removed.setdefault(shard_name(match.shard), []).append(match.key)
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": by,
            "inputs": len(matches),
            "shards": sorted(removed),
            "removed": removed,
            "sha256": sorted({match.sha256 for match in matches} - {""}),
            "note": note,
        }
        log = store.read(TAKEDOWN).decode() if store.exists(TAKEDOWN) else ""
        store.write(TAKEDOWN, log + json.dumps(entry, ensure_ascii=False) + "\n")
        apply_exclusions(store)
        run_global_pass(store, config.global_pass)
    return sorted(removed)


def lint_takedowns(store: Store) -> Iterator[str]:
    """Whatever is left of what was taken down, as a line for people."""
    digests = exclusions.taken_digests(store)
    taken = {
        key
        for entry in exclusions.read_takedowns(store)
        for keys in entry["removed"].values()
        for key in keys
    }
    if not taken:
        return
    gone = exclusions.removed_record("").reason
    for index in read_manifests(store):
        name = shard_name(index)
        columns = [
            "key",
            "source",
            "reason",
            "sha256",
            "thumbnail",
            "identity",
            "caption",
            "tar_offset",
            "held_offset",
        ]
        for row in read_sidecar(store, index, columns).to_pylist():
            if row["sha256"] in digests:
                yield f"{name}: {row['key']} is of a picture that was taken down"
            elif row["key"] in taken and (
                row["reason"] != gone
                or any(
                    row[column]
                    for column in ("source", "sha256", "thumbnail", "identity", "caption")
                )
                or max(row["tar_offset"], row["held_offset"]) >= 0
            ):
                yield f"{name}: {row['key']} was taken down, and something of it is left"
        for kind in ("tar", "held.tar"):
            if store.exists(f"{FOLDER}/{name}.{kind}"):
                with store.open(f"{FOLDER}/{name}.{kind}") as stream:
                    yield from _members_left(stream, f"{name}.{kind}", taken)
    for row in read_identities(store).to_pylist():
        if row["key"] in taken or taken & {*row["nearest"]}:
            yield f"identities.parquet: {row['key']} was taken down, or is next to one that was"


def _members_left(stream: Any, name: str, taken: set[str]) -> Iterator[str]:
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.name.partition(".")[0] in taken:
                yield f"{name}: {member.name} was taken down, and is still there"


def _with_copies(store: Store, why: Any) -> list[Match]:
    """The records that `why` gives a reason for, and those that planning or comparing found to be
    copies of them.
    """
    columns = ["key", "source", "sha256", "reason"]
    rows = [
        {"shard": index, **row}
        for index in read_manifests(store)
        for row in read_sidecar(store, index, columns).to_pylist()
        if row["reason"] != TAKEN_DOWN
    ]
    found = {row["key"]: reason for row in rows if (reason := why(row))}
    of = _copied(store)
    more = {row["key"]: "a copy of one of these" for row in rows if of.get(row["key"]) in found}
    found = more | found
    return [
        Match(
            **{name: row[name] for name in ("shard", "key", "source", "sha256")},
            why=found[row["key"]],
        )
        for row in rows
        if row["key"] in found
    ]


def _copied(store: Store) -> dict[str, str]:
    """key → key of what it is a copy of."""
    of: dict[str, str] = {}
    if store.exists(PLAN):
        plan = store.table(PLAN, ["key", "duplicate_of"])
        copies = plan.filter(pc.not_equal(plan.column("duplicate_of"), ""))
        of = {row["key"]: key_of(row["duplicate_of"]) for row in copies.to_pylist()}
    if store.exists(exclusions.DUPLICATES):
        of |= {row["key"]: row["of"] for row in store.table(exclusions.DUPLICATES).to_pylist()}
    return of


def _identity_of(config: DatasetConfig, photo: Path) -> FloatArray:
    if not photo.is_file():
        raise SourceError(f"no photograph at {photo}. Give the path of a picture of the person.")
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
            "that shows the person's "
            "face from the front."
        )
    return record.identity


def digest_of(text: str) -> str:
    """The sha256 that `text` is, or that of the file it names. Raises PipelineError for neither."""
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text.lower()):
        return text.lower()
    if Path(text).is_file():
        with Path(text).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    raise PipelineError(
        f"--hash {text!r} is neither 64 hex digits nor a file whose digest could be taken."
    )
