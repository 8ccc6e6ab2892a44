"""Lint: checks that the files of a data set are complete and match each other.

A fault is a line of text. After a fault, the other shards and tables are still checked. Every
tar and every sidecar is opened once, for its digest and for its contents.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import IO, Any, Final, cast

import pyarrow as pa

from configs.errors import ShardError, StoreError
from pipelines.dedup.global_pass import lint_identities, stale_shards
from pipelines.ledger import Ledger
from pipelines.lint_features import lint_features
from pipelines.planning.plan import planned_inputs
from pipelines.takedown import Removals, lint_removals
from stages.record import Status
from stages.storage import layout
from stages.storage.exclusions import check_log
from stages.storage.manifest import FileEntry, Manifest
from stages.storage.reader import DatasetReader
from stages.storage.samples import record_of
from stages.storage.sidecar import Row, SidecarFile, is_quarantined
from stages.storage.store import Store

_COMPARED: Final = ("source", "sha256", "caption", "license")  # in a sample and in its row
_ROW: Final = ("key", "status", "members", "quarantine_offset", *_COMPARED)
_LISTED: Final = 3  # faults of one tar; of more, only the number is stated
_AT_ONCE: Final = 64  # manifests read together
_PART: Final = 1 << 20  # bytes
_AGAIN: Final = "If no run is writing, run the pipeline again: it completes that."


def lint(
    store: Store, *, fast: bool = False, advance: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """Yields a line for each fault; none if the data set is correct. Each names a file, and what to
    do.

    fast: compares names and sizes of files, manifests, plan and configuration, and reads no tar and
    no sidecar. Otherwise also all digests, samples, rows, removals and identities, and of features
    the keys. advance: called with a number of checked shards (fast), or of bytes of tars and
    sidecars, without those of features.
    """
    lines = set[str]()
    for line in _Lint(store, fast, advance).faults():
        if line not in lines:  # several checks may read the same damaged file
            lines.add(line)
            yield line


def lint_total(store: Store, fast: bool) -> int:
    """Returns the sum of all numbers with which `lint` will call `advance`."""
    sizes = store.sizes(layout.SHARDS)
    if fast:
        return sum(layout.is_manifest(name) for name in sizes)
    return sum(size for name, size in sizes.items() if name.endswith((".tar", ".parquet")))


class _Lint:
    """One check of a data set. sizes: file name → bytes. complete: all rows could be read.
    sample_keys: of all rows that were read.
    """

    def __init__(self, store: Store, fast: bool, advance: Callable[[int], object]) -> None:
        self.store, self.fast, self.advance = store, fast, advance
        self.reader = DatasetReader(store)
        self.sizes = store.sizes(layout.SHARDS)
        self.manifests: dict[str, Manifest] = {}  # by shard
        self.sample_keys: set[str] = set()
        self.complete = True
        self.removals = Removals()

    def faults(self) -> Iterator[str]:
        yield from self._read_manifests()
        yield from self._uncommitted()
        for check in (self._plan, self._log, self._exclusions, self._texts, self._tables):
            yield from _caught(check())
        for manifest in self.manifests.values():
            yield from _caught(self._shard(manifest))
        yield from _caught(self._features())
        if not self.fast:
            yield from _caught(lint_removals(self.store, self.removals.keys))
            yield from _caught(lint_identities(self.store, self.sample_keys, self.complete))

    def _read_manifests(self) -> Iterator[str]:
        names = iter(sorted(filter(layout.is_manifest, self.sizes)))
        while part := [*islice(names, _AT_ONCE)]:
            for path, data in self.store.read_all([*map(layout.in_shards, part)]).items():
                shard = path.rpartition("/")[2].removesuffix(".json")
                try:
                    manifest = Manifest.from_json(data, f"{self.store.url}/{path}")
                    Ledger().add(manifest)
                    if manifest.shard != shard:
                        raise ShardError(
                            f"{path} is the manifest of {manifest.shard}. "
                            f"{layout.how_to_repair(path)}"
                        )
                except ShardError as error:
                    self.complete = False
                    yield str(error)
                else:
                    self.manifests[shard] = manifest
            if self.fast:
                self.advance(len(part))

    def _uncommitted(self) -> Iterator[str]:
        """Yields files that belong to no manifest."""
        if any(map(layout.is_manifest, self.store.names(layout.STAGED))):
            yield f"{layout.STAGED}: a shard is being replaced. {_AGAIN}"
        shards = set(self.reader.uncommitted())
        if shards:
            self.complete = False
        for shard in sorted(shards):
            yield (
                f"{shard}: there are files of it, but no manifest {shard}.json. Run the pipeline "
                "again: it makes the shard again."
            )
        named = {file.name for manifest in self.manifests.values() for file in manifest.files}
        manifests = {*filter(layout.is_manifest, self.sizes)}
        unreadable = {name.removesuffix(".json") for name in manifests} - {*self.manifests}
        for name in sorted(self.sizes.keys() - named - manifests):
            if name.partition(".")[0] not in shards | unreadable:
                yield f"{layout.in_shards(name)} belongs to no shard. Remove it."

    def _plan(self) -> Iterator[str]:
        """Compares the manifests with the plan."""
        planned = planned_inputs(self.store)
        if planned is None:
            yield self._missing(layout.PLAN)
            return
        for index, inputs in enumerate(planned):
            shard = layout.shard_name(index)
            manifest = self.manifests.get(shard)
            if manifest is not None and manifest.inputs != inputs:
                yield (
                    f"{layout.manifest(index)}: {manifest.inputs} inputs, but {layout.PLAN} has "
                    f"{inputs} for it. Run the pipeline again: it makes the shard again."
                )
            if not any(name.startswith(f"{shard}.") for name in self.sizes):
                self.complete = False
                yield (
                    f"{shard}: it is in {layout.PLAN}, but {layout.manifest(index)} is missing. "
                    "Run the pipeline again: it makes the shard."
                )
        for shard, manifest in self.manifests.items():
            if manifest.index >= len(planned):
                yield f"{shard}: it isn't in {layout.PLAN}. {layout.how_to_repair(layout.PLAN)}"

    def _log(self) -> Iterator[str]:
        check_log(self.store, self.manifests.values())
        self.removals = Removals.of(self.store)
        yield from ()

    def _exclusions(self) -> Iterator[str]:
        for manifest in stale_shards(self.store, self.manifests.values()):
            yield (
                f"{manifest.shard}: duplicates or removals are not applied yet. Run the pipeline "
                "again."
            )

    def _texts(self) -> Iterator[str]:
        for name, read in (
            (layout.CONFIG, self.reader.config_values),
            (layout.DATASET, self.reader.dataset_info),
        ):
            if self.store.exists(name):
                try:
                    read()
                except ShardError as error:
                    yield str(error)
            else:
                yield self._missing(name)

    def _tables(self) -> Iterator[str]:
        for name in (layout.DUPLICATES, layout.IDENTITIES):
            try:
                with self.store.parquet(name):
                    pass
            except FileNotFoundError:
                yield self._missing(name)
            except ShardError as error:
                yield str(error)

    def _features(self) -> Iterator[str]:
        return lint_features(
            self.store,
            self.manifests,
            self.removals.keys,
            self.sample_keys,
            complete=self.complete,
            fast=self.fast,
        )

    def _missing(self, name: str) -> str:
        return f"{name} is missing. {layout.how_to_repair(name)}"

    def _shard(self, manifest: Manifest) -> Iterator[str]:
        """Compares a shard's files with its manifest and with each other."""
        whole = yield from self._compare_sizes(manifest)
        if not self.fast:
            yield from self._contents(manifest, whole)

    def _compare_sizes(self, manifest: Manifest) -> Generator[str, None, list[FileEntry]]:
        """Compares sizes with the manifest. Returns the files that are there with their size."""
        whole = []
        for file in manifest.files:
            if file.name not in self.sizes:
                yield f"{manifest.shard}: {file.name} is missing. {self._repair(file)}"
            elif self.sizes[file.name] != file.bytes:
                yield (
                    f"{manifest.shard}: {file.name} has {self.sizes[file.name]:,} bytes, expected "
                    f"{file.bytes:,}. {self._repair(file)}"
                )
            else:
                whole.append(file)
        return whole

    def _contents(self, manifest: Manifest, whole: Sequence[FileEntry]) -> Iterator[str]:
        """Compares digests, rows and samples. whole: files that can be read."""
        rows: list[Row] | None = None
        if manifest.sidecar in whole:
            try:
                rows = yield from self._sidecar(manifest)
            except (ShardError, StoreError) as error:
                yield str(error)
        if rows is None:
            self.complete = False
        if manifest.tar in whole:
            yield from self._tar(manifest, manifest.tar, rows and _in_tar(rows, False))
        quarantined = rows and _in_tar(rows, True)
        if manifest.quarantine is None and quarantined:
            yield (
                f"{manifest.shard}: {len(quarantined)} rows are in a tar that is not in its "
                f"manifest. {self._repair(manifest.sidecar)}"
            )
        if manifest.quarantine is not None and manifest.quarantine in whole:
            yield from self._tar(manifest, manifest.quarantine, quarantined)

    def _repair(self, file: FileEntry) -> str:
        return layout.how_to_repair(file.name)

    def _sidecar(self, manifest: Manifest) -> Generator[str, None, list[Row] | None]:
        """Checks a sidecar. Returns its rows; None if it is damaged."""
        file = manifest.sidecar
        with self._hashed(file) as stream:
            if fault := stream.fault(manifest):
                yield fault
                return None
            stream.file.seek(0)
            with self.store.parquet(layout.in_shards(file.name), stream.file) as parquet:
                sidecar = SidecarFile(parquet)
                rows: list[Row] = sidecar.read(_ROW).to_pylist()
                yield from self.removals.rows_left(manifest, sidecar)
        if len(rows) != manifest.inputs:
            yield (
                f"{manifest.shard}: {len(rows)} rows in {file.name} for {manifest.inputs} inputs. "
                f"{self._repair(file)}"
            )
        self.sample_keys.update(row["key"] for row in rows if row["status"] == Status.OK)
        return rows

    def _tar(
        self, manifest: Manifest, file: FileEntry, rows: Sequence[Row] | None
    ) -> Iterator[str]:
        """Compares a tar with its digest and with its rows. rows: None if they can't be read."""
        with self._hashed(file) as stream:
            faults = [*_samples(stream, rows, self.removals)]
            fault = stream.fault(manifest)
        if fault:
            yield fault
        for line in faults[:_LISTED]:
            yield f"{file.name}: {line}. {self._repair(file)}"
        if len(faults) > _LISTED:
            yield f"{file.name}: and {len(faults) - _LISTED:,} more faults like these"

    @contextmanager
    def _hashed(self, file: FileEntry) -> Iterator[_Hashed]:
        try:
            with self.store.open(layout.in_shards(file.name)) as stream:
                yield _Hashed(stream, file, self.advance)
        except OSError as error:
            raise ShardError(
                f"{file.name} can't be read: {error.strerror}. {self._repair(file)}"
            ) from error


class _Hashed:
    """Reads a file once, from its start to its end, and computes its sha256 meanwhile."""

    def __init__(self, file: IO[bytes], entry: FileEntry, advance: Callable[[int], object]) -> None:
        self.file, self._entry, self._advance = file, entry, advance
        self._digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self._digest.update(data)
        self._advance(len(data))
        return data

    def fault(self, manifest: Manifest) -> str:
        """Reads the rest. Returns what is wrong with the digest; "" if nothing is."""
        while self.read(_PART):
            pass
        if self._digest.hexdigest() == self._entry.sha256:
            return ""
        return (
            f"{manifest.shard}: {self._entry.name} is not the file that was committed: it has "
            f"another sha256. {layout.how_to_repair(self._entry.name)}"
        )


def _samples(stream: _Hashed, rows: Sequence[Row] | None, removals: Removals) -> Iterator[str]:
    """Reads a tar and compares its samples with their rows."""
    missing = {row["key"]: row for row in rows or ()}
    try:
        with tarfile.open(fileobj=cast(Any, stream), mode="r|") as tar:
            for key, group in groupby(tar, lambda member: member.name.partition(".")[0]):
                members: dict[str, bytes] = {}
                places = []
                for member in group:
                    part = tar.extractfile(member)
                    name = member.name.partition(".")[2]
                    members[name] = b"" if part is None else part.read()
                    place = {"name": name, "offset": member.offset_data, "size": member.size}
                    places.append(place)
                if key in removals.keys:
                    yield f"sample {key} was taken down, but is still in the tar"
                elif rows is not None:
                    yield from _sample(key, members, places, missing.pop(key, None))
    except (tarfile.TarError, ValueError, EOFError) as error:
        yield f"it can't be read to its end: {error}"
        return
    for key in missing:
        yield f"sample {key} has a row, but isn't in the tar"


def _sample(
    key: str, members: Mapping[str, bytes], places: Sequence[Mapping[str, Any]], row: Row | None
) -> Iterator[str]:
    """Compares a sample with its row."""
    if row is None:
        yield f"sample {key} is in the tar, but has no row there"
        return
    try:
        record = record_of(members, key, f"sample {key}")
    except ShardError as error:
        yield str(error)
        return
    names = [name for name in _COMPARED if getattr(record, name) != row[name]]
    if names or row["members"] != places:
        what = ", ".join(names) or "its place in the tar"
        yield f"sample {key} differs from its row: {what}"


def _in_tar(rows: Sequence[Row], quarantine: bool) -> list[Row]:
    """Returns the rows whose samples are in the quarantine tar, or in the other one."""
    chosen = is_quarantined if quarantine else (lambda row: bool(row["status"] == Status.OK))
    return [*filter(chosen, rows)]


def _caught(faults: Iterator[str]) -> Iterator[str]:
    """Yields the faults; an error of the data set or of its store is one too."""
    try:
        yield from faults
    except (ShardError, StoreError, pa.ArrowException) as error:
        yield str(error)
