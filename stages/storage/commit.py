"""Commit: writing one shard, so that it exists whole or not at all.

A shard is a tar of samples, a sidecar with a row for every input, and a manifest, which is written
last: without it the shard doesn't exist. Complete samples that a rule or an exclusion dropped are
in a tar of their own (quarantine), apart from those that people train on; another rule restores
them without a model call. Tars and sidecar depend on inputs, signatures and exclusions alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from configs.errors import ShardError
from stages.base import Stage
from stages.fields import Annotation
from stages.record import Record, Status
from stages.storage import exclusions, layout
from stages.storage.manifest import FileEntry, Manifest, RunInfo
from stages.storage.reader import DatasetReader
from stages.storage.samples import TarWriter, to_members
from stages.storage.sidecar import Row, sidecar_row, write_sidecar
from stages.storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """digest: equal digests mean equal inputs (name, size, version, copies) in equal order."""

    index: int
    inputs: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class ChainInfo:
    """What a shard's files say of the stages that made it."""

    signatures: tuple[str, ...]
    annotations: tuple[type[Annotation], ...]

    @staticmethod
    def of(stages: Sequence[Stage]) -> ChainInfo:
        kinds = [stage.annotation for stage in stages]
        return ChainInfo(
            signatures=tuple(stage.signature() for stage in stages),
            annotations=tuple(kind for kind in kinds if kind is not None),
        )


def commit(
    store: Store, shard: PlannedShard, records: Sequence[Record], chain: ChainInfo, run: RunInfo
) -> Manifest:
    """Writes `shard` from all its records, in input order; returns its manifest.

    Applies the exclusions that the output holds on the shard. The old manifest is removed first and
    the new one written last: between the two the shard doesn't exist. Raises ShardError if two
    records have the same key.
    """
    keys = Counter(record.key for record in records)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ShardError(
            f"{layout.shard_name(shard.index)}: {len(twice)} keys occur twice, the first is "
            f"{twice[0]}"
        )
    excluded = exclusions.of_shard(store, shard.index)
    records = [exclusions.apply(excluded.get(record.key), record) for record in records]
    rows = {record.key: sidecar_row(record, chain.annotations) for record in records}
    _remove(store, shard.index)

    def write_tar(stream: IO[bytes], chosen: Sequence[Record], kind: str) -> None:
        tar = TarWriter(stream)
        for record in chosen:
            place = tar.add(record.key, to_members(record, chain.annotations))
            row: Row = rows[record.key]
            row[f"{kind}_offset"], row[f"{kind}_size"] = place["offset"], place["size"]
            row["members"] = place["members"]
        tar.finish()

    written = [record for record in records if record.ok]
    quarantined = [record for record in records if record.quarantined]
    name = layout.tar(shard.index)
    tar = _write(store, name, lambda stream: write_tar(stream, written, "tar"))
    name, quarantine = layout.quarantine_tar(shard.index), None
    if quarantined:
        quarantine = _write(
            store, name, lambda stream: write_tar(stream, quarantined, "quarantine")
        )
    sidecar = _write(
        store,
        layout.sidecar(shard.index),
        lambda stream: write_sidecar(list(rows.values()), chain.annotations, stream),
    )
    manifest = Manifest(
        shard=layout.shard_name(shard.index),
        inputs=len(records),
        written=len(written),
        dropped=_reasons(records, Status.DROPPED),
        failed=_reasons(records, Status.FAILED),
        inputs_digest=shard.digest,
        signatures=chain.signatures,
        exclusions=exclusions.digest(excluded),
        tar=tar,
        quarantine=quarantine,
        sidecar=sidecar,
        run=run,
    )
    store.write(layout.in_shards(layout.manifest(shard.index)), manifest.to_json())
    return manifest


def commit_exclusions(store: Store, manifest: Manifest, chain: ChainInfo) -> Manifest:
    """Writes a shard again from its own samples, because the exclusions on it have changed.

    No stage runs; signatures and run stay those of the shard. chain: for the annotations.
    """
    shard = PlannedShard(
        index=manifest.index, inputs=manifest.inputs, bytes=0, digest=manifest.inputs_digest
    )
    records = DatasetReader(store).records(manifest.index)
    restored = [exclusions.restored(record) for record in records]
    own = ChainInfo(manifest.signatures, chain.annotations)
    return commit(store, shard, restored, own, manifest.run)


def _remove(store: Store, index: int) -> None:
    """Removes a shard's manifest, and those of its files that a new commit may not replace."""
    name = layout.shard_name(index)
    store.remove(layout.in_shards(layout.manifest(index)))
    for file in store.names(layout.SHARDS):
        if file.startswith(f"{name}.") and file.endswith(".tar") and file != layout.tar(index):
            store.remove(layout.in_shards(file))


def _reasons(records: Sequence[Record], status: Status) -> Mapping[str, int]:
    counts = Counter(record.reason for record in records if record.status is status)
    return dict(sorted(counts.items()))


def _write(store: Store, name: str, write: Callable[[IO[bytes]], None]) -> FileEntry:
    """Writes a file of a shard; returns its entry in the manifest."""
    with store.writer(layout.in_shards(name)) as stream:
        hashed = _HashedStream(stream)
        write(hashed)  # type: ignore[arg-type]
    return FileEntry(name=name, bytes=hashed.count, sha256=hashed.sha256)


class _HashedStream:
    """Counts and digests what is written through it. Closing it leaves the stream open."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self.count = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.count += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        pass

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
