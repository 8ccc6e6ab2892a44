"""Plan: assigns inputs to shards, and finds the shards that must be processed.

The sorted inputs are divided into shards once. An input never changes its shard, also if the source
no longer lists it; new inputs go into new shards. The plan is stored as plan.parquet with one row
group for each shard, so that a worker reads only the rows of its shard. It is made in an SQLite
file on local disk, so that the driver's memory doesn't grow with the number of inputs.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ShardError, SourceError, StoreError
from configs.schema import DatasetConfig
from pipelines.planning.exact_copies import mark_exact_copies
from pipelines.planning.input_index import COLUMNS, InputIndex, input_from_row
from pipelines.sources import Input, Source, build_source
from pipelines.sources.passed_over import PassedOver
from stages.base import Stage
from stages.storage.commit import PlannedShard
from stages.storage.exclusions import check_log, removed_keys
from stages.storage.layout import PLAN, SHARDS, index_of_manifest, index_of_sidecar
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.repair import intact_records, is_readable
from stages.storage.store import Store

logger = logging.getLogger(__name__)

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_SQLITE: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)

_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("locator", pa.binary()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("facts", pa.string()),
        ("duplicate_of", pa.string()),
        ("vanished", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard to process.

    exists: it is committed, and its samples can be reused. stale_stages: names of the stages whose
    results may differ now. inputs_changed: some of its inputs may have changed since the commit.
    retry: reasons; records that were dropped or failed with one of them are read from the source
    and processed again. damaged: some of its files are; only intact records are reused.
    """

    shard: PlannedShard
    exists: bool = False
    stale_stages: frozenset[str] = frozenset()
    inputs_changed: bool = False
    retry: frozenset[str] = frozenset()
    damaged: bool = False

    @property
    def index(self) -> int:
        return self.shard.index

    @property
    def inputs(self) -> int:
        return self.shard.inputs

    @property
    def bytes(self) -> int:
        return self.shard.bytes

    def may_need(self, stage: str) -> bool:
        """Returns whether a record may need the stage of this name, other than one that a changed
        rule restores.
        """
        is_new = not self.exists or self.inputs_changed or self.damaged
        return is_new or bool(self.retry) or stage in self.stale_stages


@dataclass(kw_only=True)
class Plan:
    """A plan. file: plan.parquet as an unnamed file on local disk. new, changed, vanished: numbers
    of inputs, compared with the plan in the output. passed_over: what the source didn't list.
    """

    file: IO[bytes]
    shards: tuple[PlannedShard, ...]
    new: int = 0
    changed: int = 0
    vanished: int = 0
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def inputs(self) -> int:
        """The number of all inputs."""
        return sum(shard.inputs for shard in self.shards)

    def inputs_of(self, shard: int) -> list[Input]:
        """Returns the inputs of one shard, in order."""
        return _read_group(self._table, shard)

    @cached_property
    def _table(self) -> pq.ParquetFile:
        """Opened once: its footer grows with the number of shards."""
        return pq.ParquetFile(self.file)


def make_plan(config: DatasetConfig, store: Store, *, repair: bool = False) -> Plan:
    """Lists the source and assigns its inputs to shards. Writes nothing to the output.

    A plan that the output has lost is made again from the sidecars, which have the names and the
    order of the inputs; so is a damaged one if `repair` is set. Raises SourceError if the source
    lists no input, ShardError if another version of this program wrote the plan in the output or
    if it is damaged, StoreError if the local disk is full.
    """
    try:
        return _make_plan(config, store, repair)
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, OSError):
            is_full = error.errno in _DISK_FULL
        else:
            # the low byte of the code is the primary code
            is_full = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_FULL_SQLITE
        if not is_full:
            raise
        raise StoreError(
            f"there is no room for the plan on local disk: {error}. Free space in the folder for "
            "temporary files (/tmp, /var/tmp), or set TMPDIR to another folder; then run the same "
            "command again."
        ) from error


def _make_plan(config: DatasetConfig, store: Store, repair: bool) -> Plan:
    with InputIndex() as index:
        if not store.exists(PLAN) or (repair and not is_readable(store, PLAN)):
            index.load_previous_plan(_rows_of_sidecars(store, repair))
        else:
            index.load_previous_plan(_read_rows(store))
        source = build_source(config)
        listed = _add_listed(index, source, repair or config.source.missing == "keep")
        if not listed and len(index) and config.source.missing == "drop":
            raise SourceError(
                f"source.path={config.source.path!r} lists no input, and source.missing=drop would "
                f"drop all {len(index):,} of {store.url}. Is the disk there? To give up the data "
                "set, delete it."
            )
        if not len(index):
            passed_over = source.passed_over.lines(config.source.extensions)
            raise SourceError(
                f"source.path={config.source.path!r} holds no "
                f"{', '.join(config.source.extensions)} files, in the folder or in its subfolders. "
                f"{' '.join(['Give another folder, or other source.extensions.', *passed_over])}"
            )
        removed = removed_keys(store)
        index.forget_vanished(removed)
        new, changed, vanished = index.assign_shards(config.shard_size)
        if config.source.find_copies:
            mark_exact_copies(index, source, removed)
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the plan
        shards = tuple(_write(index, file, drops_vanished=config.source.missing == "drop"))
        file.flush()
    return Plan(
        file=file,
        shards=shards,
        new=new,
        changed=changed,
        vanished=vanished,
        passed_over=source.passed_over,
    )


def _add_listed(index: InputIndex, source: Source, may_be_gone: bool) -> int:
    """Adds what the source lists to the index. Returns the number of inputs.

    may_be_gone: a source of which nothing can be listed has no inputs, if there is an earlier plan.
    """
    count = 0
    try:
        for item in source.list():
            index.add_listed(item)
            count += 1
    except SourceError as error:
        if count or not may_be_gone or not len(index):
            raise
        logger.warning("%s Its inputs count as gone.", error)
    return count


def _write(index: InputIndex, file: IO[bytes], drops_vanished: bool) -> Iterator[PlannedShard]:
    """Writes the plan as parquet, and yields each shard. drops_vanished: whether a shard is pending
    because an input has vanished.
    """
    with pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for number, rows in index.shards():
            lines = (
                f"{row['key']} {input_from_row(row).revision} {row['duplicate_of']}"
                + " vanished" * (drops_vanished and row["vanished"])
                for row in rows
            )
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
            writer.write_table(
                pa.Table.from_pylist([{"shard": number, **row} for row in rows], schema=_SCHEMA)
            )
            total = sum(max(row["size"], 0) for row in rows)
            yield PlannedShard(index=number, inputs=len(rows), bytes=total, digest=digest)


def pending(
    plan: Plan,
    store: Store,
    stages: Sequence[Stage],
    retry: frozenset[str] = frozenset(),
    damaged: Set[int] = frozenset(),
) -> list[ShardTask]:
    """Returns a task for each shard that isn't committed with the plan's inputs and the stages'
    signatures, that has records to retry, or that is damaged. retry: reasons. damaged: numbers of
    shards.
    """
    signatures = tuple(stage.signature() for stage in stages)
    manifests = DatasetReader(store).manifests(readable_only=bool(damaged))
    check_log(store, manifests.values())
    tasks = (
        _task(shard, manifests.get(shard.index), stages, signatures, retry, shard.index in damaged)
        for shard in plan.shards
    )
    return [task for task in tasks if task is not None]


def _task(
    shard: PlannedShard,
    manifest: Manifest | None,
    stages: Sequence[Stage],
    signatures: Sequence[str],
    retry: frozenset[str],
    damaged: bool,
) -> ShardTask | None:
    stale = None
    if manifest is not None:
        stale = stale_stages(stages, signatures, manifest.signatures)
    if manifest is None or stale is None:
        return ShardTask(shard=shard, damaged=damaged)
    task = ShardTask(
        shard=shard,
        exists=True,
        stale_stages=stale,
        inputs_changed=manifest.inputs_digest != shard.digest,
        retry=retry & {*manifest.failed, *manifest.dropped},
        damaged=damaged,
    )
    unchanged = manifest.signatures == signatures
    is_pending = not unchanged or task.inputs_changed or task.retry or damaged
    return task if is_pending else None


def stale_stages(
    stages: Sequence[Stage], signatures: Sequence[str], shard_signatures: Sequence[str]
) -> frozenset[str] | None:
    """Returns the names of the stages whose results in a shard may differ now: new and changed
    stages, and those that read what a stale stage provides.

    Returns None if the shard must be processed from the source, because a stage that replaces what
    it reads (such as resize) is stale, or because the chain no longer has one of the shard's
    stages. signatures: of `stages`. shard_signatures: of the shard's manifest.
    """
    names = {stage.name for stage in stages}
    if not {signature.rsplit("-", 2)[0] for signature in shard_signatures} <= names:
        return None
    changed = {
        stage.name
        for stage, signature in zip(stages, signatures, strict=True)
        if signature not in shard_signatures
    }
    return with_readers(stages, changed)


def with_readers(
    stages: Sequence[Stage], changed: Set[str], fields: Set[str] = frozenset()
) -> frozenset[str] | None:
    """Returns the names of the stages in `changed`, and of those that read what a stale stage
    provides or one of `fields`, record fields that have changed.

    Returns None if one of them replaces what it reads.
    """
    stale: set[str] = set()
    stale_fields = {*fields}
    for stage in stages:
        if stage.name in changed or stale_fields & {*stage.requires}:
            stale.add(stage.name)
            stale_fields |= {*stage.provides}
            if {*stage.requires} & {*stage.provides}:
                return None
    return frozenset(stale)


def planned_inputs(store: Store) -> list[int] | None:
    """Returns the number of inputs of each shard in the output's plan; None if it has no plan."""
    if not store.exists(PLAN):
        return None
    with store.parquet(PLAN) as file:
        groups = range(file.num_row_groups)
        return [file.metadata.row_group(group).num_rows for group in groups]


def read_inputs(store: Store, shard: int) -> list[Input]:
    """Returns the inputs of one shard, in order, from the output's plan."""
    with store.parquet(PLAN) as file:
        return _read_group(file, shard)


def write_plan(plan: Plan, store: Store) -> None:
    """Writes the plan to the output unless the output has the same plan."""
    if store.exists(PLAN) and _is_stored(plan.file, store):
        return
    plan.file.seek(0)
    with store.writer(PLAN) as target:
        shutil.copyfileobj(plan.file, target, 1 << 20)


def _is_stored(file: IO[bytes], store: Store) -> bool:
    """Returns whether the output's plan has the same bytes as `file`. Reads both in parts, since
    plans may be large.
    """
    file.seek(0)
    with store.open(PLAN) as stored:
        while (part := file.read(1 << 20)) == stored.read(1 << 20):
            if not part:
                return True
    return False


def _read_rows(store: Store) -> Iterator[dict[str, Any]]:
    """Yields the rows of the output's plan."""
    with store.parquet(PLAN) as file:
        if missing := {"shard", *COLUMNS} - {*file.schema_arrow.names}:
            raise ShardError(
                f"{store.url}: {PLAN} has no column {', '.join(sorted(missing))}: another version "
                "of this program wrote it. Use another output, or the version that wrote it."
            )
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=["shard", *COLUMNS]).to_pylist()


def _rows_of_sidecars(store: Store, repair: bool) -> Iterator[dict[str, Any]]:
    """Yields a plan's rows, without locator, size and version, of all shards with a sidecar. The
    sidecar doesn't have the names of removed records either.

    repair: of a shard without a sidecar that can be read, yield the rows of its written samples.
    """
    unknown = {"locator": b"", "size": -1, "version": "", "facts": ""}
    for index in _shards_with_files(store):
        try:
            rows = DatasetReader(store).rows(index, ("key", "source")).to_pylist()
        except ShardError:
            if not repair:
                raise
            records = intact_records(store, index).by_key.values()
            rows = [{"key": record.key, "source": record.source} for record in records]
        yield from ({**row, **unknown, "shard": index} for row in rows)


def _shards_with_files(store: Store) -> list[int]:
    """Returns the numbers of the shards that have a sidecar or a manifest."""
    names = store.names(SHARDS)
    indexes = {index_of_sidecar(name) for name in names} | {*map(index_of_manifest, names)}
    return sorted(index for index in indexes if index is not None)


def _read_group(file: pq.ParquetFile, group: int) -> list[Input]:
    # Plans of version 0.1 have no column `vanished`.
    names = [name for name in file.schema_arrow.names if name in (*COLUMNS, "vanished")]
    rows = file.read_row_group(group, columns=names).to_pylist()
    return [input_from_row(row) for row in rows]
