"""Resume: loads the records of a shard, with the stages that each of them still needs.

A record comes from the source, or from the shard's own samples if its results can be reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from configs.errors import ShardError
from configs.schema import DatasetConfig
from pipelines.planning.plan import ShardTask, read_inputs
from pipelines.sources import STAGE, build_source
from stages.base import PendingRecord, Stage, StageNames
from stages.record import Record, Status
from stages.storage import exclusions
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

NO_STAGES: Final[StageNames] = frozenset()


def load_shard(
    config: DatasetConfig, store: Store, task: ShardTask, stages: Sequence[Stage]
) -> Iterator[PendingRecord]:
    """Yields the records of a shard's inputs, in order, each as soon as it has been read.

    Raises ShardError if the output's plan of this shard isn't that of the task.
    """
    items = read_inputs(store, task.shard.index)
    if len(items) != task.shard.inputs:
        raise ShardError(
            f"{store.url}: the plan of shard {task.shard.index} was changed during this run. Run "
            "the same command again."
        )
    source = build_source(config)
    removed_digests = exclusions.removed_digests(store)
    excluded = exclusions.of_shard(store, task.shard.index)
    removed = {key for key, exclusion in excluded.items() if exclusion.is_removal}
    reader = DatasetReader(store)
    earlier = {r.key: r for r in reader.records(task.shard.index)} if task.exists else {}
    reusable = {
        key: pending
        for key, record in earlier.items()
        if (pending := continued_record(record, task, stages))
    }
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
        fields = source.provided_fields(item)
        provided = frozenset(
            stage.name for stage in stages if stage.provides and fields.issuperset(stage.provides)
        )
        old = reusable.get(item.key)
        new = next(arriving) if item.key in read_keys else None
        # A vanished input can't be compared, so its earlier result is reused.
        vanished = item.vanished and old is not None and earlier[item.key].stage != STAGE
        if old is not None and (
            new is None or vanished or source.is_unchanged(earlier[item.key], new)
        ):
            yield PendingRecord(old.record, old.remaining_stages - provided)
        elif new is None:
            raise AssertionError("an input is reused or read")
        elif new.sha256 in removed_digests:
            yield PendingRecord(exclusions.removed_record(new.key), NO_STAGES)
        else:
            names = frozenset(stage.name for stage in stages)
            yield PendingRecord(new, names - provided)


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
