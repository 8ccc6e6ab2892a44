"""Shards: the commit, and reading back.

A shard is a tar of samples, a parquet sidecar with a row for every input (dropped and failed ones
too), and a manifest, written last. What a rule dropped is whole, and lies in a tar of its own
(`.held.tar`), out of the way of those who read samples: another rule takes it back without a model
call. A shard without a manifest doesn't exist. Its files depend on inputs, signatures and verdicts
alone; whatever varies from run to run (times, hosts, attempts) stays in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import IO, Any

import pyarrow as pa

from configs.errors import ShardError
from stages.codec import from_members, to_members
from stages.record import SCHEMA_VERSION, Record, Status
from stages.storage import exclusions
from stages.storage.sidecar import SIDECAR_SCHEMA, Row, ended_record, sidecar_row, write_sidecar
from stages.storage.store import Store

FOLDER = "shards"

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """digest: equal digests mean equal inputs (by name, size, version and copies), in equal order."""

    index: int
    inputs: int
    bytes: int
    digest: str


def shard_name(index: int) -> str:
    return f"fgid-{index:06d}"


@dataclass(frozen=True, slots=True)
class ShardRun:
    """What varies from run to run, for the manifest: seconds by stage, and which executor.

    counts: by stage, of what it counts itself, such as a captioner's tokens.
    """

    seconds: dict[str, float]
    executor: str
    started: float  # Unix time
    attempt: int = 1
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For the manifest, the run ending now."""
        now = time.time()
        return {
            "finished": round(now, 3),
            "seconds": round(now - self.started, 3),
            "stage_seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
            "stage_counts": self.counts,
            "executor": self.executor,
            "attempt": self.attempt,
            "host": platform.node(),
        }


def commit(
    store: Store,
    shard: PlannedShard,
    records: Sequence[Record],
    signatures: Sequence[str],
    run: ShardRun | Mapping[str, Any],
) -> Manifest:
    """Write `shard` from all its records, in order; returns its manifest.

    The verdicts that the output holds on the shard are carried out here, and nowhere else. The old
    manifest goes first, the new one comes last: between the two the shard doesn't exist. Raises
    ShardError if two records have the same key.
    """
    twice = [key for key, count in Counter(record.key for record in records).items() if count > 1]
    if twice:
        raise ShardError(
            f"{shard_name(shard.index)}: {len(twice)} keys occur twice, the first is {twice[0]}"
        )
    told = exclusions.of_shard(store, shard.index)
    records = [exclusions.apply(told.get(record.key), record) for record in records]
    name = shard_name(shard.index)
    store.remove(f"{FOLDER}/{name}.json")
    rows = {record.key: sidecar_row(record) for record in records}
    files = {
        "tar": _put(
            store,
            f"{name}.tar",
            lambda out: _write_tar(out, [r for r in records if r.ok], rows, "tar"),
        )
    }
    if held := [record for record in records if record.quarantined]:
        files["held"] = _put(
            store, f"{name}.held.tar", lambda out: _write_tar(out, held, rows, "held")
        )
    else:
        store.remove(f"{FOLDER}/{name}.held.tar")
    table = pa.Table.from_pylist(list(rows.values()), schema=SIDECAR_SCHEMA)
    files["parquet"] = _put(store, f"{name}.parquet", lambda out: write_sidecar(table, out))
    by_status = {
        status: Counter(r.reason for r in records if r.status is status) for status in Status
    }
    manifest = {
        "schema": SCHEMA_VERSION,
        "shard": name,
        "inputs": len(records),
        "written": by_status[Status.OK].total(),
        "dropped": dict(sorted(by_status[Status.DROPPED].items())),
        "failed": dict(sorted(by_status[Status.FAILED].items())),
        "inputs_digest": shard.digest,
        "signatures": list(signatures),
        "verdicts": exclusions.digest(told),
        "files": files,
        "run": run.told() if isinstance(run, ShardRun) else run,
    }
    store.write(f"{FOLDER}/{name}.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def commit_again(store: Store, manifest: Manifest) -> Manifest:
    """Write a shard again from what it holds, since the verdicts on it have changed; no stage is at
    work. Its run stays the one that made it.
    """
    index = int(manifest["shard"].rpartition("-")[2])
    shard = PlannedShard(
        index=index, inputs=manifest["inputs"], bytes=0, digest=manifest["inputs_digest"]
    )
    records = [exclusions.restored(record) for record in read_records(store, index)]
    return commit(store, shard, records, manifest["signatures"], manifest["run"])


def _put(store: Store, name: str, write: Callable[[_Hashed], None]) -> dict[str, Any]:
    """Write a file of a shard; what the manifest says of it."""
    with store.writer(f"{FOLDER}/{name}") as stream:
        out = _Hashed(stream)
        write(out)
    return {"name": name, "bytes": out.count, "sha256": out.sha256}


def _write_tar(out: _Hashed, records: Sequence[Record], rows: Mapping[str, Row], kind: str) -> None:
    """Write whole records as samples; says in their sidecar rows where, as `kind`_offset and
    `kind`_size.
    """
    for record in records:
        row, start = rows[record.key], out.count
        for extension, data in to_members(record).items():
            info = tarfile.TarInfo(f"{record.key}.{extension}")
            # mtime, uid and gid stay 0: no run leaves a trace
            info.size, info.mode = len(data), 0o644
            out.write(info.tobuf(tarfile.USTAR_FORMAT))
            row["members"].append({"name": extension, "offset": out.count, "size": len(data)})
            out.write(data)
            out.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        row[f"{kind}_offset"], row[f"{kind}_size"] = start, out.count - start
    end = 2 * tarfile.BLOCKSIZE
    out.write(bytes(end + -(out.count + end) % tarfile.RECORDSIZE))


# --------------------------------------------------------------------------------------------------


def read_manifests(store: Store) -> dict[int, dict[str, Any]]:
    """index → manifest of every committed shard, in order. Raises ShardError for one this program
    can't read.
    """
    found = {}
    names = [
        f"{FOLDER}/{name}"
        for name in store.names(FOLDER)
        if name.startswith("fgid-") and name.endswith(".json")
    ]
    for name, data in store.read_all(names).items():
        try:
            manifest = json.loads(data)
        except ValueError as error:
            raise ShardError(
                f"{store.url}: {name} is not JSON: {error}. Remove it, and run again."
            ) from error
        if manifest.get("schema") != SCHEMA_VERSION:
            raise ShardError(
                f"{store.url}: {name} has schema {manifest.get('schema')}, this program writes "
                f"{SCHEMA_VERSION}. "
                "Use another output, or the program version that wrote it."
            )
        found[int(manifest["shard"][5:])] = manifest
    return dict(sorted(found.items()))


def manifests(store: Store) -> Iterator[dict[str, Any]]:
    """Every committed shard's manifest, in order."""
    yield from read_manifests(store).values()


def read_sidecar(store: Store, index: int, columns: list[str] | None = None) -> pa.Table:
    """The sidecar's rows, in input order. Raises FileNotFoundError."""
    return store.table(f"{FOLDER}/{shard_name(index)}.parquet", columns)


def read_records(store: Store, index: int) -> list[Record]:
    """Every input's record: samples and held ones whole, others with their reason and no payload.
    Raises ShardError.
    """
    name = f"{FOLDER}/{shard_name(index)}"
    rows = read_sidecar(store, index).to_pylist()
    with ExitStack() as stack:
        tar = stack.enter_context(store.open(f"{name}.tar"))
        held = (
            stack.enter_context(store.open(f"{name}.held.tar"))
            if any(map(is_quarantined, rows))
            else tar
        )
        return [_record(held if is_quarantined(row) else tar, row) for row in rows]


def is_quarantined(row: Mapping[str, Any]) -> bool:
    """True of a sidecar row whose record a rule dropped, and whose sample lies in the held tar."""
    return bool(row["held_offset"] >= 0)


def _record(tar: IO[bytes], row: Row) -> Record:
    if row["status"] != Status.OK and not is_quarantined(row):
        return ended_record(row)
    return replace(
        read_sample(tar, row),
        thumbnail=row["thumbnail"],
        status=Status(row["status"]),
        **{name: row[name] for name in ("reason", "detail", "stage")},
    )


def read_sample(tar: IO[bytes], row: Row) -> Record:
    """The sample, ok, that sidecar row `row` points at. Raises ShardError if the tar holds another
    one there.
    """
    members = {}
    for member in row["members"]:
        tar.seek(member["offset"])
        members[member["name"]] = tar.read(member["size"])
    try:
        record = from_members(members)
    except (KeyError, ValueError) as error:
        raise ShardError(f"sample {row['key']} ({row['source']}) can't be read: {error}") from error
    if record.key != row["key"]:
        raise ShardError(f"sample {row['key']} ({row['source']}): the tar holds {record.key} there")
    return record


# --------------------------------------------------------------------------------------------------


class _Hashed:
    """Counts and digests what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self.count, self.closed = stream, hashlib.sha256(), 0, False

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.count += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The stream belongs to the caller."""

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
