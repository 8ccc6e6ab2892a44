"""Commit: writes one shard, so that it exists completely or not at all.

A shard is a tar of samples, a sidecar with a row for every input, and a manifest, which is written
last: a shard without a manifest doesn't exist. Complete samples that a rule or an exclusion dropped
are in a second tar (quarantine), so that nobody trains on them; changed rules restore them without
a model call. Tars and sidecar depend only on inputs, signatures and exclusions.

The new files of a shard that exists are staged: they are written to another folder first, and moved
when all of them, with their manifest, are complete. A commit that fails or is killed before that
leaves the shard as it was; `complete_commits` finishes one that was killed after that.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, cast

from configs.errors import ShardError
from stages.base import Stage
from stages.fields import Annotation
from stages.record import Record, Status
from stages.storage import exclusions, layout
from stages.storage.lock import RunLock
from stages.storage.manifest import FileEntry, Manifest, RunInfo
from stages.storage.reader import DatasetReader
from stages.storage.samples import TarWriter, to_members
from stages.storage.sidecar import Row, sidecar_row, write_sidecar
from stages.storage.store import Store

# A record and the classes of annotations → extension → bytes of the sample's members.
Members = Callable[[Record, Sequence[type[Annotation]]], dict[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """A shard of the plan. inputs: their number. bytes: their total size. digest: equal digests
    mean equal inputs (name, size, version, person, exact copies) in equal order.
    """

    index: int
    inputs: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class ChainInfo:
    """What a shard's files record about the chain: signatures of its stages, in order, and classes
    of their annotations.
    """

    signatures: tuple[str, ...]
    annotations: tuple[type[Annotation], ...]

    @staticmethod
    def of(stages: Sequence[Stage], signed: Collection[str] | None = None) -> ChainInfo:
        """Returns what to record about these stages. signed: names of the stages whose signatures
        are needed; None: all. That of captions from a server asks the server.
        """
        kinds = [stage.annotation for stage in stages]
        return ChainInfo(
            signatures=tuple(s.signature() for s in stages if signed is None or s.name in signed),
            annotations=tuple(kind for kind in kinds if kind is not None),
        )


def commit(
    store: Store,
    shard: PlannedShard,
    records: Sequence[Record],
    chain: ChainInfo,
    run: RunInfo,
    members: Members = to_members,
) -> Manifest:
    """Writes `shard` and returns its manifest.

    records: of all inputs of the shard, in input order; the shard's exclusions are applied to them.
    members: what is written of a sample. Raises ShardError if two records have the same key.
    """
    keys = Counter(record.key for record in records)
    if repeated := [key for key, count in keys.items() if count > 1]:
        raise ShardError(
            f"{layout.shard_name(shard.index)}: {len(repeated)} keys occur more than once, the "
            f"first is {repeated[0]}"
        )
    excluded = exclusions.of_shard(store, shard.index)
    records = [exclusions.apply(excluded.get(record.key), record) for record in records]
    rows = {record.key: sidecar_row(record, chain.annotations) for record in records}
    # without its manifest too: `intact_records` reads sidecar and tar of such a shard
    names = (layout.manifest(shard.index), layout.sidecar(shard.index))
    exists = any(store.exists(layout.in_shards(name)) for name in names)
    folder = layout.STAGED if exists else layout.SHARDS

    def write_tar(stream: IO[bytes], chosen: Sequence[Record], kind: str) -> None:
        tar = TarWriter(stream)
        for record in chosen:
            place = tar.add(record.key, members(record, chain.annotations))
            row: Row = rows[record.key]
            row[f"{kind}_offset"], row[f"{kind}_size"] = place["offset"], place["size"]
            row["members"], row["sample_sha256"] = place["members"], place["sha256"]
        tar.finish()

    written = [record for record in records if record.ok]
    quarantined = [record for record in records if record.quarantined]
    name = layout.tar(shard.index)
    tar = _write(store, folder, name, lambda stream: write_tar(stream, written, "tar"))
    name, quarantine = layout.quarantine_tar(shard.index), None
    if quarantined:
        quarantine = _write(
            store, folder, name, lambda stream: write_tar(stream, quarantined, "quarantine")
        )
    sidecar = _write(
        store,
        folder,
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
    if exists:
        store.write(layout.in_staged(layout.manifest(shard.index)), manifest.to_json())
        _replace(store, manifest)
    else:
        _finish(store, manifest)
    return manifest


def commit_exclusions(store: Store, manifest: Manifest, chain: ChainInfo) -> Manifest:
    """Rewrites a shard from its own samples with the present exclusions. Returns its manifest.

    No stage runs; signatures and run information stay as they are. chain: for its annotations.
    """
    shard = PlannedShard(
        index=manifest.index, inputs=manifest.inputs, bytes=0, digest=manifest.inputs_digest
    )
    records = DatasetReader(store).records(manifest.index)
    restored = [exclusions.restored(record) for record in records]
    unchanged = ChainInfo(manifest.signatures, chain.annotations)
    return commit(store, shard, restored, unchanged, manifest.run)


def complete_commits(store: Store) -> None:
    """Completes or removes what killed writers left: temporary files, and staged files. Staged
    files that aren't complete never replace a shard. Call it while holding the run lock.
    """
    for folder in (layout.SHARDS, layout.STAGED, layout.REPORTS):
        store.sweep(folder)
    store.sweep(spare=layout.LOCK)  # another run may be trying to create the lock at this moment
    for name in store.names(layout.STAGED):
        if layout.is_manifest(name) and (manifest := _replacement(store, name)):
            _replace(store, manifest)
    for name in store.names(layout.STAGED):
        store.remove(layout.in_staged(name))


def _replacement(store: Store, name: str) -> Manifest | None:
    """Returns a staged manifest; None if the shard is still as it was, and its replacement is
    damaged or not complete. name: of the manifest.

    Raises ShardError for a damaged manifest of a shard whose files are partly moved.
    """
    path = layout.in_staged(name)
    is_untouched = store.exists(layout.in_shards(name))
    try:
        manifest = Manifest.from_json(store.read(path), f"{store.url}/{path}")
    except ShardError:
        if is_untouched:
            return None
        raise
    is_complete = manifest.index == layout.index_of_manifest(name) and all(
        _has_digest(store, file) for file in manifest.files
    )
    return None if is_untouched and not is_complete else manifest


def _has_digest(store: Store, file: FileEntry) -> bool:
    """Returns whether a file is staged, with the digest of its entry."""
    try:
        with store.open(layout.in_staged(file.name)) as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        return False


def complete_killed_commits(store: Store) -> None:
    """Calls `complete_commits` with the run lock, if a killed writer left staged files."""
    if store.names(layout.STAGED):
        with RunLock(store):
            complete_commits(store)


def _replace(store: Store, manifest: Manifest) -> None:
    """Moves the staged files of a shard to their places. It may be repeated after a kill.

    The old manifest is removed first: none ever describes files of another commit.
    """
    store.remove(layout.in_shards(layout.manifest(manifest.index)))
    for file in manifest.files:
        with suppress(FileNotFoundError):  # moved by an earlier attempt
            store.move(layout.in_staged(file.name), layout.in_shards(file.name))
    _finish(store, manifest)
    store.remove(layout.in_staged(layout.manifest(manifest.index)))


def _finish(store: Store, manifest: Manifest) -> None:
    """Removes files of earlier commits that the new one doesn't have, among them features of the
    earlier samples, and writes the manifest.
    """
    names = {file.name for file in manifest.files}
    index = manifest.index
    for name in {layout.quarantine_tar(index), layout.quarantine_tar_version2(index)} - names:
        store.remove(layout.in_shards(name))
    remove_features(store, index)
    store.write(layout.in_shards(layout.manifest(index)), manifest.to_json())


def remove_features(store: Store, index: int) -> None:
    """Removes what was computed of a shard's samples, which may show people that it shows no more.

    Its manifests are removed first.
    """
    files = (layout.manifest(index), layout.sidecar(index), layout.tar(index))
    for folder in store.names(layout.FEATURES):
        if folder.startswith(".") or "-" not in folder:  # not one of a kind
            continue
        top = f"{layout.FEATURES}/{folder}"
        for name in files:
            for place in (layout.in_shards(name), layout.in_staged(name)):
                store.remove(f"{top}/{place}")
        for part in (layout.SHARDS, layout.STAGED):  # of a killed run, which holds no lock any more
            store.sweep(f"{top}/{part}")


def remove_uncommitted(store: Store) -> None:
    """Removes the files of shards without a manifest, which a killed commit has written. Call it
    while holding the run lock.

    Raises ShardError if a shard has a sidecar, but no manifest: it may be complete, and its sources
    may be gone.
    """
    committed = {layout.shard_name(index) for index in DatasetReader(store).manifests()}
    uncommitted = [
        name for name in store.names(layout.SHARDS) if name.partition(".")[0] not in committed
    ]
    for name in uncommitted:
        if (index := layout.index_of_sidecar(name)) is not None:
            manifest = layout.in_shards(layout.manifest(index))
            raise ShardError(
                f"{store.url}/{manifest} is missing, but not the files of its shard. "
                f"{layout.how_to_repair(manifest)}"
            )
    for name in uncommitted:
        store.remove(layout.in_shards(name))


def _reasons(records: Sequence[Record], status: Status) -> Mapping[str, int]:
    """Returns reason → number of the records with this status, sorted by reason."""
    counts = Counter(record.reason for record in records if record.status is status)
    return dict(sorted(counts.items()))


def _write(store: Store, folder: str, name: str, write: Callable[[IO[bytes]], None]) -> FileEntry:
    """Writes a file of a shard and returns its entry for the manifest."""
    with store.writer(f"{folder}/{name}") as stream:
        hashed = _HashedStream(stream)
        write(hashed)  # type: ignore[arg-type]
    return FileEntry(name=name, bytes=hashed.count, sha256=hashed.sha256)


class _HashedStream:
    """Passes data on to a stream, and computes its size and sha256. `close` doesn't close the
    stream.
    """

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
