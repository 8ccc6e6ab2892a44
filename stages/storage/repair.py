"""Repair: finds damaged files of a data set, and the records that the damage didn't touch.

A sample counts as intact if its tar has the digest of the manifest, or else its own bytes have the
digest of its row. Rows count as intact if the sidecar has the digest of the manifest, or, where the
manifest is lost, if every page has its checksum.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any, Final

from configs.errors import ShardError
from stages.fields import Column
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.manifest import FileEntry, Manifest
from stages.storage.reader import DatasetReader
from stages.storage.samples import parse_sample, read_tar
from stages.storage.sidecar import Row, has_sample, is_quarantined, row_to_record, with_row_fields
from stages.storage.store import Store

_BLOCK: Final = 1 << 20
_TABLES: Final = (layout.PLAN, layout.DUPLICATES, layout.IDENTITIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A damaged or missing file. name: relative to OUT. how: what is wrong. shard: its number; -1:
    the file is of the whole data set.
    """

    name: str
    how: str
    shard: int = -1


@dataclass(frozen=True, slots=True)
class IntactRecords:
    """Records of a shard by key that are as they were committed.

    from_tar: the sidecar is lost, so they lack the fields that only rows have
    (stages.storage.samples.NOT_IN_TARS), and dropped and failed records are not among them.
    """

    by_key: Mapping[str, Record] = field(default_factory=dict)
    from_tar: bool = False


def find_damage(store: Store, advance: Callable[[int], None] = lambda count: None) -> list[Damage]:
    """Reads every file of the data set that has a digest or checksums, and returns those that are
    damaged or missing, in the order of the shards. advance: called with the number of bytes read.
    """
    damage: list[Damage] = []
    sizes = store.sizes(layout.SHARDS)
    reader = DatasetReader(store)
    manifests = reader.manifests(readable_only=True)
    indexes = {layout.index_of_sidecar(name) for name in sizes}
    indexes |= {layout.index_of_manifest(name) for name in sizes}
    for index in indexes - {None} - {*manifests}:
        assert index is not None
        lost = layout.manifest(index)
        how = "it is not a manifest" if lost in sizes else "it is missing"
        damage.append(Damage(name=layout.in_shards(lost), how=how, shard=index))
    for index, manifest in manifests.items():
        differences = {
            file.name: how
            for file in manifest.files
            if (how := _difference(store, file, sizes, advance))
        }
        if manifest.sidecar.name not in differences and not _has_counts(reader, manifest):
            differences[layout.manifest(index)] = "its numbers are not those of its sidecar"
        damage += [
            Damage(name=layout.in_shards(name), how=how, shard=index)
            for name, how in differences.items()
        ]
    damage += [
        Damage(name=name, how="it can't be read")
        for name in _TABLES
        if store.exists(name) and not is_readable(store, name)
    ]
    return sorted(damage, key=lambda each: (each.shard, each.name))


def _has_counts(reader: DatasetReader, manifest: Manifest) -> bool:
    """Returns whether the ledger of a manifest is that of its sidecar."""
    rows = reader.rows(manifest.index, ("status", "reason")).to_pylist()
    counted = Counter((row["status"], row["reason"]) for row in rows)
    stated = Counter({(Status.OK.value, ""): manifest.written}) + Counter(
        {
            (status.value, reason): count
            for status, counts in (
                (Status.DROPPED, manifest.dropped),
                (Status.FAILED, manifest.failed),
            )
            for reason, count in counts.items()
        }
    )
    return counted == stated and len(rows) == manifest.inputs


def is_readable(store: Store, name: str) -> bool:
    """Returns whether all rows of a parquet file can be read."""
    try:
        with store.parquet(name) as table:
            for group in range(table.num_row_groups):
                table.read_row_group(group)
    except ShardError:
        return False
    return True


def _difference(
    store: Store, file: FileEntry, sizes: Mapping[str, int], advance: Callable[[int], None]
) -> str:
    """Returns how a file differs from its entry in the manifest; "" if it doesn't."""
    if file.name not in sizes:
        return "it is missing"
    if sizes[file.name] != file.bytes:
        return f"it has {sizes[file.name]:,} bytes, expected {file.bytes:,}"
    with store.open(layout.in_shards(file.name)) as stream:
        return "" if _digest(stream, advance) == file.sha256 else "its sha256 is another"


def _digest(stream: IO[bytes], advance: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
        advance(len(block))
    return digest.hexdigest()


def intact_records(store: Store, index: int) -> IntactRecords:
    """Returns the records of a shard that its files still hold as they were committed. Samples are
    complete. Works without a manifest; returns no records if nothing is intact or committed.
    """
    manifest = DatasetReader(store).manifests(readable_only=True).get(index)
    with ExitStack() as stack:
        entries = (manifest.tar, manifest.quarantine) if manifest else (None, None)
        tar = _Tar.open(stack, store, layout.tar(index), entries[0])
        quarantine = _Tar.open(stack, store, layout.quarantine_tar(index), entries[1])
        read = _intact_rows(store, index, manifest)
        if read is None:
            samples = read_tar(tar.stream) if tar and tar.is_intact else ()
            return IntactRecords({record.key: record for record in samples}, from_tar=True)
        rows, columns = read
        records: dict[str, Record] = {}
        for row in rows:
            if not has_sample(row):
                records[row["key"]] = row_to_record(row, columns)
                continue
            source = quarantine if is_quarantined(row) else tar
            if source is not None and (sample := source.sample(row)) is not None:
                records[row["key"]] = with_row_fields(sample, row)
        return IntactRecords(records)


def _intact_rows(
    store: Store, index: int, manifest: Manifest | None
) -> tuple[list[Row], Mapping[str, Column]] | None:
    """Returns (rows, columns) of a sidecar; None if it isn't intact."""
    reader = DatasetReader(store)
    name = manifest.sidecar.name if manifest else layout.sidecar(index)
    try:
        if manifest is not None:
            with store.open(layout.in_shards(name)) as stream:
                if _digest(stream) != manifest.sidecar.sha256:
                    return None
        with reader.sidecar(index) as file:
            columns = file.columns
            if manifest is None and "sample_sha256" not in columns:  # then it has no checksums
                return None
            return file.read().to_pylist(), columns
    except (ShardError, FileNotFoundError):
        return None


@dataclass(slots=True)
class _Tar:
    """An open tar. sha256: of the manifest; "": unknown."""

    name: str
    stream: IO[bytes]
    sha256: str
    _is_intact: bool | None = None

    @staticmethod
    def open(stack: ExitStack, store: Store, name: str, entry: FileEntry | None) -> _Tar | None:
        """Returns the tar; None if it is missing. name: used if it has no entry."""
        name = entry.name if entry else name
        try:
            stream: Any = store.open(layout.in_shards(name))
        except FileNotFoundError:
            return None
        return _Tar(name, stack.enter_context(stream), entry.sha256 if entry else "")

    @property
    def is_intact(self) -> bool:
        """Whether the whole file has the digest of the manifest."""
        if self._is_intact is None:
            self.stream.seek(0)
            self._is_intact = bool(self.sha256) and _digest(self.stream) == self.sha256
            self.stream.seek(0)
        return self._is_intact

    def sample(self, row: Row) -> Record | None:
        """Returns the sample of a sidecar row; None if its bytes aren't those of the commit."""
        kind = "quarantine" if is_quarantined(row) else "tar"
        self.stream.seek(row[f"{kind}_offset"])
        data = self.stream.read(row[f"{kind}_size"])
        expected = row.get("sample_sha256")  # sidecars before version 0.2 don't have it
        has_digest = expected and hashlib.sha256(data).hexdigest() == expected
        is_intact = has_digest if expected else self.is_intact
        return parse_sample(data, row["key"], self.name) if is_intact else None
