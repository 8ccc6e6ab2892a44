"""What goes into a shard's stages: records from the source, or from the shard's own samples, and
what each still needs.

One rule decides, for each input: what an earlier run has made of it is kept wherever the same would
be made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from configs.errors import ShardError
from configs.schema import DatasetConfig
from pipelines.planning.plan import ShardTask, read_inputs
from pipelines.sources import build_source
from stages.base import Stage, StageNames
from stages.record import Record, Status
from stages.storage import exclusions
from stages.storage.commit import read_records
from stages.storage.store import Store

NOTHING: Final[StageNames] = frozenset()


@dataclass(frozen=True, slots=True)
class PendingRecord:
    """A record and the names of the stages it still needs."""

    record: Record
    remaining_stages: StageNames


def load_shard(
    config: DatasetConfig, store: Store, task: ShardTask, stages: Sequence[Stage]
) -> Iterator[PendingRecord]:
    """The shard's inputs, in order, as the stages take them, each as soon as it is there: a source
    that reads several at a time goes on meanwhile. Raises ShardError if the plan kept is another
    one.
    """
    items = read_inputs(store, task.shard.index)
    if len(items) != task.shard.inputs:
        raise ShardError(
            f"{store.url}: the plan of shard {task.shard.index} has changed under this run. Run "
            "it again."
        )
    source = build_source(config)
    banned = exclusions.taken_digests(store)
    taken = {
        key
        for key, verdict in exclusions.of_shard(store, task.shard.index).items()
        if verdict.final
    }
    made = (
        {record.key: record for record in read_records(store, task.shard.index)}
        if task.exists
        else {}
    )
    names = [stage.name for stage in stages]
    kept = {key: work for key, record in made.items() if (work := _continued(record, task, names))}
    fresh = [
        item for item in items if item.key not in taken and (item.key not in kept or task.moved)
    ]
    arrived = iter(source.records(fresh))
    again = frozenset(item.key for item in fresh)
    for item in items:
        if item.key in taken:
            yield PendingRecord(exclusions.removed_record(item.key), NOTHING)
            continue
        fields = source.provided_fields(item)
        given = frozenset(
            stage.name for stage in stages if stage.provides and fields.issuperset(stage.provides)
        )
        old, new = kept.get(item.key), next(arrived) if item.key in again else None
        if old is not None and (new is None or source.is_unchanged(made[item.key], new)):
            yield PendingRecord(old.record, old.remaining_stages - given)
        else:
            assert new is not None, "an input is kept, or it is read"
            gone = new.sha256 in banned
            yield (
                PendingRecord(exclusions.removed_record(new.key), NOTHING)
                if gone
                else PendingRecord(new, frozenset(names) - given)
            )


def _continued(record: Record, task: ShardTask, names: Sequence[str]) -> PendingRecord | None:
    """What an earlier run made of an input, to go on from; None where it must be made again from
    its source.

    A verdict stands unless a stage up to the one that gave it answers anew. A record that was held
    comes back then, and needs the stages from there on; one held as a copy is as whole as a sample,
    and if it still is a copy, the commit holds it again.
    """
    if record.reason in task.retry:
        return None
    if record.ok or (record.quarantined and record.stage not in names):
        return PendingRecord(restored_record(record), task.again)
    place = names.index(record.stage) if record.stage in names else -1
    if not task.again & {*names[: place + 1]}:
        return PendingRecord(record, NOTHING)
    return (
        PendingRecord(restored_record(record), task.again | {*names[place:]})
        if record.quarantined
        else None
    )


def restored_record(record: Record) -> Record:
    return replace(record, status=Status.OK, reason="", detail="", stage="")
