"""Shards: the commit, and reading back.

A shard is a tar of samples, a parquet sidecar with a row for every input (dropped and failed ones too), and a manifest,
written last. A shard without a manifest doesn't exist. Tar and parquet depend on inputs and signatures alone; whatever
varies from run to run (times, hosts, attempts) stays in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ShardError
from pipelines.store import Store
from stages.backends.protocols import LabelMap
from stages.codec import decode_labels, from_members, to_members
from stages.record import SCHEMA_VERSION, Record, Status, face_to_dict
from stages.regions import LABELS

FOLDER = "shards"

Manifest = dict[str, Any]

_MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_FACE = pa.struct([("box", pa.list_(pa.float64())), ("landmarks", pa.list_(pa.float64())), ("score", pa.float64())])
SIDECAR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("stage", pa.string()),
        ("sha256", pa.string()),
        ("tar_offset", pa.int64()),  # of the sample's first header; -1 where none was written
        ("tar_size", pa.int64()),  # bytes of the sample in the tar, headers and padding included
        ("members", pa.list_(_MEMBER)),  # data offsets, from the tar's beginning
        ("license", pa.string()),
        ("author", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("faces", pa.list_(_FACE)),
        ("face", pa.int32()),
        ("label_areas", pa.list_(pa.float32())),  # share of the picture, one for each of the 19 labels
        ("caption", pa.string()),
        ("face_caption", pa.string()),
    ],
    metadata={"record_schema": str(SCHEMA_VERSION)},
)


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


def commit(
    store: Store, shard: PlannedShard, records: Sequence[Record], signatures: Sequence[str], run: ShardRun
) -> dict[str, Any]:
    """Write `shard` from all its records, in order; returns its manifest.

    The old manifest goes first, the new one comes last: between the two the shard doesn't exist. Raises ShardError if
    two records have the same key.
    """
    twice = [key for key, count in Counter(record.key for record in records).items() if count > 1]
    if twice:
        raise ShardError(f"{shard_name(shard.index)}: {len(twice)} keys occur twice, the first is {twice[0]}")
    name = shard_name(shard.index)
    store.remove(f"{FOLDER}/{name}.json")
    with store.writer(f"{FOLDER}/{name}.tar") as stream:
        tar = _Hashed(stream)
        rows = _write_tar(tar, records)
    with store.writer(f"{FOLDER}/{name}.parquet") as stream:
        sidecar = _Hashed(stream)
        pq.write_table(pa.Table.from_pylist(rows, schema=SIDECAR_SCHEMA), cast(IO[bytes], sidecar), compression="zstd")
    by_status = {status: Counter(r.reason for r in records if r.status is status) for status in Status}
    manifest = {
        "schema": SCHEMA_VERSION,
        "shard": name,
        "inputs": len(records),
        "written": by_status[Status.OK].total(),
        "dropped": dict(sorted(by_status[Status.DROPPED].items())),
        "failed": dict(sorted(by_status[Status.FAILED].items())),
        "inputs_digest": shard.digest,
        "signatures": list(signatures),
        "files": {
            "tar": {"name": f"{name}.tar", "bytes": tar.count, "sha256": tar.sha256},
            "parquet": {"name": f"{name}.parquet", "bytes": sidecar.count, "sha256": sidecar.sha256},
        },
        "run": {
            "finished": round(time.time(), 3),
            "seconds": round(time.time() - run.started, 3),
            "stage_seconds": {stage: round(value, 4) for stage, value in run.seconds.items()},
            "stage_counts": run.counts,
            "executor": run.executor,
            "attempt": run.attempt,
            "host": platform.node(),
        },
    }
    store.write(f"{FOLDER}/{name}.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write_tar(stream: _Hashed, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Write the ok records as samples; returns a sidecar row for every record."""
    rows = []
    for record in records:
        row = _sidecar_row(record)
        if record.ok:
            row["tar_offset"] = stream.count
            for extension, data in to_members(record).items():
                info = tarfile.TarInfo(f"{record.key}.{extension}")
                info.size, info.mode = len(data), 0o644  # mtime, uid and gid stay 0: no run leaves a trace
                stream.write(info.tobuf(tarfile.USTAR_FORMAT))
                row["members"].append({"name": extension, "offset": stream.count, "size": len(data)})
                stream.write(data)
                stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))
            row["tar_size"] = stream.count - row["tar_offset"]
        rows.append(row)
    end = 2 * tarfile.BLOCKSIZE
    stream.write(bytes(end + -(stream.count + end) % tarfile.RECORDSIZE))
    return rows


def _sidecar_row(record: Record) -> dict[str, Any]:
    areas = _label_areas(decode_labels(record.parsing)) if record.ok and record.parsing else []
    return {
        "key": record.key,
        "source": record.source,
        "status": record.status.value,
        "reason": record.reason,
        "detail": record.detail,
        "stage": record.stage,
        "sha256": record.sha256,
        "tar_offset": -1,
        "tar_size": 0,
        "members": [],
        "license": record.license,
        "author": record.author,
        "width": record.width,
        "height": record.height,
        "faces": [face_to_dict(face) for face in record.faces],
        "face": record.face,
        "label_areas": areas,
        "caption": record.caption,
        "face_caption": record.face_caption,
    }


def _label_areas(labels: LabelMap) -> list[float]:
    """Each label's share of the picture. Counted by runs of equal labels: there are few, of many pixels."""
    flat = labels.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    pixels = np.bincount(flat[starts], np.diff(starts, append=flat.size), len(LABELS))
    return list(pixels / flat.size)


# ------------------------------------------------------------------------------------------------------- reading


def read_manifests(store: Store) -> dict[int, dict[str, Any]]:
    """index → manifest of every committed shard, in order. Raises ShardError for one this program can't read."""
    found = {}
    names = [f"{FOLDER}/{name}" for name in store.names(FOLDER) if name.startswith("fgid-") and name.endswith(".json")]
    for name, data in store.read_all(names).items():
        try:
            manifest = json.loads(data)
        except ValueError as error:
            raise ShardError(f"{store.url}: {name} is not JSON: {error}. Remove it, and run again.") from error
        if manifest.get("schema") != SCHEMA_VERSION:
            raise ShardError(
                f"{store.url}: {name} has schema {manifest.get('schema')}, this program writes {SCHEMA_VERSION}. "
                "Use another output, or the program version that wrote it."
            )
        found[int(manifest["shard"][5:])] = manifest
    return dict(sorted(found.items()))


def manifests(store: Store) -> Iterator[dict[str, Any]]:
    """Every committed shard's manifest, in order."""
    yield from read_manifests(store).values()


def read_sidecar(store: Store, index: int, columns: list[str] | None = None) -> pa.Table:
    """The sidecar's rows, in input order. Raises FileNotFoundError."""
    with store.open(f"{FOLDER}/{shard_name(index)}.parquet") as stream:
        return pq.read_table(stream, columns=columns)


def read_records(store: Store, index: int) -> list[Record]:
    """Every input's record: samples whole, ended ones with their reason and no payload. Raises ShardError."""
    records = []
    with store.open(f"{FOLDER}/{shard_name(index)}.tar") as tar:
        for row in read_sidecar(store, index).to_pylist():
            records.append(read_sample(tar, row) if row["status"] == Status.OK else _ended(row))
    return records


def read_sample(tar: IO[bytes], row: dict[str, Any]) -> Record:
    """The record that sidecar row `row` points at. Raises ShardError if the tar holds another one there."""
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


def _ended(row: dict[str, Any]) -> Record:
    names = ("key", "source", "sha256", "license", "author", "width", "height", "reason", "detail", "stage")
    return Record(status=Status(row["status"]), face=row["face"], **{name: row[name] for name in names})


# ----------------------------------------------------------------------------------------------------- streams


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
