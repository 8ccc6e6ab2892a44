"""Resume: loads the records of a shard, with the stages that each of them still needs.

A record comes from the source, or from the shard's own samples if its results can be reused, or if
its input can't be read any more and `source.missing` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from configs.errors import ShardError
from configs.schema import DatasetConfig
from pipelines.planning.missing import Loss, refuse, why_lost
from pipelines.planning.plan import ShardTask, read_inputs, with_readers
from pipelines.sources import STAGE, Input, Source, build_source
from stages.base import PendingRecord, Stage, StageNames
from stages.record import PROVENANCE, Record, Status
from stages.storage import exclusions
from stages.storage.reader import DatasetReader
from stages.storage.repair import IntactRecords, intact_records
from stages.storage.samples import NOT_IN_TARS
from stages.storage.store import Store

NO_STAGES: Final[StageNames] = frozenset()


def load_shard(
    config: DatasetConfig,
    store: Store,
    task: ShardTask,
    stages: Sequence[Stage],
    items: Sequence[Input] | None = None,
) -> Iterator[PendingRecord]:
    """Yields the records of a shard's inputs, in order, each as soon as it has been read.

    items: the inputs; None: those of the output's plan.

    Raises ShardError if the output's plan of this shard isn't that of the task, or if a file of
    the shard is damaged; SourceError if a sample would be lost with its input and
    `source.missing` is stop.
    """
    items = read_inputs(store, task.shard.index) if items is None else items
    if len(items) != task.shard.inputs:
        raise ShardError(
            f"{store.url}: the plan of shard {task.shard.index} was changed during this run. Run "
            "the same command again."
        )
    source = build_source(config)
    removed_digests = exclusions.removed_digests(store)
    excluded = exclusions.of_shard(store, task.shard.index)
    removed = {key for key, exclusion in excluded.items() if exclusion.is_removal}
    earlier = _Earlier(store, task)
    reusable = {
        key: pending
        for key, record in earlier.records.items()
        if (pending := continued_record(record, task, stages))
    }
    missing = _missing(config, task)
    choice = _Choice(source, earlier, reusable, task, stages, missing, removed_digests)
    to_read = [
        item
        for item in items
        if item.key not in removed and (item.key not in reusable or task.inputs_changed)
    ]
    arriving = iter(source.records(to_read))
    read_keys = frozenset(item.key for item in to_read)
    for item in items:
        if item.key in removed:
            yield PendingRecord(exclusions.removed_record(item.key), NO_STAGES)
            continue
        pending = choice.of(item, next(arriving) if item.key in read_keys else None)
        fields = source.provided_fields(item)
        provided = frozenset(stage.name for stage in stages if _is_provided(stage, fields))
        yield PendingRecord(pending.record, pending.remaining_stages - provided)


def _is_provided(stage: Stage, fields: Set[str]) -> bool:
    """True if an input comes with all record fields that a stage provides; no input comes with
    annotations.
    """
    own = {*stage.provides} - ({stage.annotation.name} if stage.annotation else set())
    return bool(own) and own <= fields


def _missing(config: DatasetConfig, task: ShardTask) -> str:
    """Returns `source.missing` for a task. What a repair finds damaged is lost already: it keeps
    the rest and doesn't stop.
    """
    missing = config.source.missing
    return "keep" if missing == "stop" and task.damaged else missing


@dataclass(frozen=True)
class _Choice:
    """Chooses between the record of an input that was just read and that of an earlier run.
    reusable: by key. missing: see SourceConfig.
    """

    source: Source
    earlier: _Earlier
    reusable: Mapping[str, PendingRecord]
    task: ShardTask
    stages: Sequence[Stage]
    missing: str
    removed_digests: Set[str]

    def of(self, item: Input, new: Record | None) -> PendingRecord:
        """Returns an input's record, with the stages that it still needs. new: as read; None: it
        needn't be read. Raises SourceError for a sample that would be lost, if that stops the run.
        """
        old = self.reusable.get(item.key)
        if old is not None and new is not None and not item.vanished:
            old = self._restated(old, self.earlier.records[item.key], new)
        if old is not None and (new is None or self._is_reused(item, new)):
            return self.earlier.completed(old, self.stages)
        assert new is not None, "an input is reused or read"
        if new.sha256 in self.removed_digests:
            return PendingRecord(exclusions.removed_record(new.key), NO_STAGES)
        if lost := self._why_lost(item, new):
            if self.missing == "stop":
                refuse([Loss(item.source, lost)], len(self.earlier.samples))
            intact = self.earlier.intact.by_key.get(item.key)
            if old is None and intact and intact.sha256 not in self.removed_digests:
                old = PendingRecord(exclusions.restored(intact), NO_STAGES)
            if old is not None:
                return self.earlier.completed(old, self.stages)
        return PendingRecord(new, frozenset(stage.name for stage in self.stages))

    def _restated(self, old: PendingRecord, earlier: Record, new: Record) -> PendingRecord | None:
        """Returns what can be reused of a record, with the provenance that the source states now.
        The stages that read what has changed of it run again. old: what could be reused if nothing
        had. earlier: the record as it was committed.
        """
        stated = {name: getattr(new, name) for name in PROVENANCE}
        changed = {name for name, text in stated.items() if text != getattr(earlier, name)}
        if not changed:
            return old
        stale = with_readers(self.stages, self.task.stale_stages, changed)
        if stale is None:
            return None
        task = replace(self.task, stale_stages=stale)
        return continued_record(replace(earlier, **stated), task, self.stages)

    def _is_reused(self, item: Input, new: Record) -> bool:
        """Returns whether an input is unchanged. A vanished one can't be compared."""
        earlier = self.earlier.records[item.key]
        if item.vanished and self.missing != "drop" and earlier.stage != STAGE:
            return True
        return self.source.is_unchanged(earlier, new)

    def _why_lost(self, item: Input, new: Record) -> str:
        if item.key not in self.earlier.samples or self.missing == "drop":
            return ""
        return why_lost(item, new, self.earlier.samples[item.key], self.source, self.stages)


@dataclass(frozen=True)
class _Earlier:
    """The records and samples that a shard had before it is processed again."""

    store: Store
    task: ShardTask

    @cached_property
    def records(self) -> Mapping[str, Record]:
        """By key, those whose results may be reused. Raises ShardError for a damaged file, unless
        the task repairs it.
        """
        if not self.task.exists:
            return {}
        if self.task.damaged:
            return self.intact.by_key
        return {r.key: r for r in DatasetReader(self.store).records(self.task.index)}

    @cached_property
    def samples(self) -> Mapping[str, str]:
        """Key → sha256 of the input, of each sample; if the task repairs, of intact ones."""
        if not self.task.exists and not self.task.damaged:
            rows = DatasetReader(self.store).sampled_rows(self.task.index)
            return {key: row["sha256"] for key, row in rows.items()}
        records = self.intact.by_key if self.task.damaged else self.records
        return {key: r.sha256 for key, r in records.items() if r.ok or r.quarantined}

    @cached_property
    def intact(self) -> IntactRecords:
        """The records that are as they were committed, whether or not results may be reused."""
        return intact_records(self.store, self.task.index)

    def completed(self, item: PendingRecord, stages: Sequence[Stage]) -> PendingRecord:
        """Returns the item with the stages that provide what its record lacks because the sidecar
        is lost.
        """
        if not (self.task.damaged and self.intact.from_tar):
            return item
        names = frozenset(stage.name for stage in stages if NOT_IN_TARS & {*stage.provides})
        return PendingRecord(item.record, item.remaining_stages | names)


def continued_record(
    record: Record, task: ShardTask, stages: Sequence[Stage]
) -> PendingRecord | None:
    """Returns the record of an earlier run with the stages that it still needs; None if the input
    must be read from the source and processed by all stages.

    A dropped or failed record is unchanged, unless the stage that dropped it or an earlier one is
    stale. In that case, a quarantined record is restored, and needs the stages from that one on. A
    quarantined duplicate is treated as a sample: the commit quarantines it again if it still is a
    duplicate.
    """
    if record.reason in task.retry:
        return None
    names = [stage.name for stage in stages]
    if record.ok or (record.quarantined and record.stage not in names):
        return _pending(record, task.stale_stages, stages)
    place = names.index(record.stage) if record.stage in names else -1
    if not task.stale_stages & {*names[: place + 1]}:
        return PendingRecord(record, NO_STAGES)
    if not record.quarantined:
        return None
    return _pending(record, task.stale_stages | {*names[place:]}, stages)


def _pending(
    record: Record, remaining_stages: StageNames, stages: Sequence[Stage]
) -> PendingRecord:
    """Returns the record as ok, without the annotations that the remaining stages will record."""
    outdated = {
        stage.annotation.name
        for stage in stages
        if stage.annotation is not None and stage.name in remaining_stages
    }
    annotations = {n: values for n, values in record.annotations.items() if n not in outdated}
    restored = replace(
        record, status=Status.OK, reason="", detail="", stage="", annotations=annotations
    )
    return PendingRecord(restored, remaining_stages)
