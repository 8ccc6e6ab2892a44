"""Plan: which input belongs to which shard, kept for good; and what each shard still needs.

The sorted inputs are cut into shards once. A known input keeps its shard for ever, new ones are cut
into new shards behind; one that has vanished keeps its place. The plan is `plan.parquet`, one row
group for each shard, so that a worker reads its own shard's rows only. It is made in an SQLite file
on local disk: millions of inputs are sorted and compared there, and the driver's memory doesn't
grow with their number.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ShardError, SourceError, StoreError
from configs.schema import DatasetConfig
from pipelines.planning.exact_copies import mark_exact_copies
from pipelines.planning.input_index import COLUMNS, InputIndex, input_from_row
from pipelines.sources import Input, build_source
from stages.base import Stage
from stages.storage.commit import PlannedShard
from stages.storage.layout import PLAN
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_SQLITE: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)

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
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard to be made.

    exists: it is committed, and what its samples hold can be reused. stale_stages: stages whose
    answers would be different now. inputs_changed: its inputs aren't all those it was made from.
    retry: reasons; records that were dropped or failed with one are made again from the source.
    """

    shard: PlannedShard
    exists: bool = False
    stale_stages: frozenset[str] = frozenset()
    inputs_changed: bool = False
    retry: frozenset[str] = frozenset()

    @property
    def index(self) -> int:
        return self.shard.index

    @property
    def inputs(self) -> int:
        return self.shard.inputs

    @property
    def bytes(self) -> int:
        return self.shard.bytes


@dataclass(kw_only=True)
class Plan:
    """file: the plan on local disk, without a name. new, changed, vanished: inputs, against the
    plan kept.
    """

    file: IO[bytes]
    shards: tuple[PlannedShard, ...]
    new: int = 0
    changed: int = 0
    vanished: int = 0

    @property
    def inputs(self) -> int:
        return sum(shard.inputs for shard in self.shards)

    def inputs_of(self, shard: int) -> list[Input]:
        return _read_group(pq.ParquetFile(self.file), shard)


def make_plan(config: DatasetConfig, store: Store) -> Plan:
    """List the source and place every input; the output is left alone. Raises SourceError if there
    is none at all, ShardError where another version of this program kept the plan, StoreError where
    local disk has no room for it.
    """
    try:
        return _make_plan(config, store)
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, OSError):
            no_room = error.errno in _NO_ROOM
        else:
            # its low byte is the kind
            no_room = getattr(error, "sqlite_errorcode", 0) & 0xFF in _NO_ROOM_SQLITE
        if not no_room:
            raise
        raise StoreError(
            f"there is no room for the plan on local disk: {error}. Make room in the folder for "
            "temporary files (/tmp, /var/tmp), or name a folder elsewhere in TMPDIR; then run the "
            "same command again."
        ) from error


def _make_plan(config: DatasetConfig, store: Store) -> Plan:
    with InputIndex() as index:
        index.load_previous_plan(_read_rows(store))
        source = build_source(config)
        for item in source.list():
            index.add_listed(item)
        if not len(index):
            raise SourceError(
                f"source.path={config.source.path!r} holds no "
                f"{', '.join(config.source.extensions)} files, at any "
                "depth. Give another folder, or other source.extensions."
            )
        new, changed, vanished = index.assign_shards(config.shard_size)
        if config.source.find_copies:
            mark_exact_copies(index, source)
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the plan
        shards = tuple(_write(index, file))
        file.flush()
    return Plan(file=file, shards=shards, new=new, changed=changed, vanished=vanished)


def _write(index: InputIndex, file: IO[bytes]) -> Iterator[PlannedShard]:
    with pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for number, rows in index.shards():
            lines = (
                f"{row['key']} {row['size']} {row['version']} {row['duplicate_of']}" for row in rows
            )
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
            writer.write_table(
                pa.Table.from_pylist([{"shard": number, **row} for row in rows], schema=_SCHEMA)
            )
            total = sum(max(row["size"], 0) for row in rows)
            yield PlannedShard(index=number, inputs=len(rows), bytes=total, digest=digest)


def pending(
    plan: Plan, store: Store, stages: Sequence[Stage], retry: frozenset[str] = frozenset()
) -> list[ShardTask]:
    """The shards that aren't committed with these inputs and signatures, or that hold records to be
    tried again."""
    signatures = tuple(stage.signature() for stage in stages)
    manifests = DatasetReader(store).manifests()
    tasks = (
        _task(shard, manifests.get(shard.index), stages, signatures, retry) for shard in plan.shards
    )
    return [task for task in tasks if task is not None]


def _task(
    shard: PlannedShard,
    manifest: Manifest | None,
    stages: Sequence[Stage],
    signatures: Sequence[str],
    retry: frozenset[str],
) -> ShardTask | None:
    if manifest is None:
        return ShardTask(shard=shard)
    stale = stale_stages(stages, signatures, manifest.signatures)
    if stale is None:
        return ShardTask(shard=shard)
    task = ShardTask(
        shard=shard,
        exists=True,
        stale_stages=stale,
        inputs_changed=manifest.inputs_digest != shard.digest,
        retry=retry & {*manifest.failed, *manifest.dropped},
    )
    unchanged = manifest.signatures == signatures
    return None if unchanged and not (task.inputs_changed or task.retry) else task


def stale_stages(
    stages: Sequence[Stage], signatures: Sequence[str], made_with: Sequence[str]
) -> frozenset[str] | None:
    """The stages whose answers would be different now, in a shard made with the signatures
    `made_with`: stages that are new or changed, and those that read what these provide.

    None where the shard must be made from its sources: a stage that replaces what it reads, as
    resize does, has changed, or one is gone.
    """
    names = {stage.name for stage in stages}
    if not {signature.rsplit("-", 2)[0] for signature in made_with} <= names:
        return None
    stale: set[str] = set()
    remade: set[str] = set()
    for stage, signature in zip(stages, signatures, strict=True):
        if signature not in made_with or remade & {*stage.requires}:
            stale.add(stage.name)
            remade |= {*stage.provides}
            if {*stage.requires} & {*stage.provides}:
                return None
    return frozenset(stale)


def planned_shards(store: Store) -> int:
    """How many shards the plan kept in the output has."""
    if not store.exists(PLAN):
        return 0
    with store.parquet(PLAN) as file:
        return int(file.num_row_groups)


def read_inputs(store: Store, shard: int) -> list[Input]:
    """The inputs of one shard, in order, from the plan kept in the output."""
    with store.parquet(PLAN) as file:
        return _read_group(file, shard)


def write_plan(plan: Plan, store: Store) -> None:
    """Keep the plan in the output; nothing is written where it is there already."""
    if store.exists(PLAN) and _same(plan.file, store):
        return
    plan.file.seek(0)
    with store.writer(PLAN) as target:
        shutil.copyfileobj(plan.file, target, 1 << 20)


def _same(file: IO[bytes], store: Store) -> bool:
    """True if the plan kept is this file, byte for byte; read a little at a time, since plans have
    no upper size.
    """
    file.seek(0)
    with store.open(PLAN) as kept:
        while (part := file.read(1 << 20)) == kept.read(1 << 20):
            if not part:
                return True
    return False


def _read_rows(store: Store) -> Iterator[dict[str, Any]]:
    if not store.exists(PLAN):
        return
    with store.parquet(PLAN) as file:
        if missing := {"shard", *COLUMNS} - {*file.schema_arrow.names}:
            raise ShardError(
                f"{store.url}: {PLAN} has no column {', '.join(sorted(missing))}: another "
                "version of this program "
                "wrote it. Use another output, or the version that wrote it."
            )
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=["shard", *COLUMNS]).to_pylist()


def _read_group(file: pq.ParquetFile, group: int) -> list[Input]:
    rows = file.read_row_group(group, columns=list(COLUMNS)).to_pylist()
    return [input_from_row(row) for row in rows]
