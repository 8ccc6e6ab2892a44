"""What goes into a shard's stages: records from the source, or from the shard's own samples, and what each still needs.

One rule decides, for each input: what an earlier run has made of it is kept wherever the same would be made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs.errors import ShardError
from configs.schema import DatasetConfig
from pipelines.plan import ShardTask, read_inputs
from pipelines.shards import read_records
from pipelines.sources import build_source
from pipelines.store import Store
from stages.base import Stage, Todo
from stages.record import Record


@dataclass(frozen=True, slots=True)
class Work:
    """A record and the names of the stages it still needs."""

    record: Record
    todo: Todo


def load_shard(config: DatasetConfig, store: Store, task: ShardTask, stages: Sequence[Stage]) -> Iterator[Work]:
    """The shard's inputs, in order, as the stages take them, each as soon as it is there: a source that reads several
    at a time goes on meanwhile. Raises ShardError if the plan kept is another one."""
    items = read_inputs(store, task.shard.index)
    if len(items) != task.shard.inputs:
        raise ShardError(f"{store.url}: the plan of shard {task.shard.index} has changed under this run. Run it again.")
    source = build_source(config)
    made = {record.key: record for record in read_records(store, task.shard.index)} if task.exists else {}
    names = [stage.name for stage in stages]
    kept = {item.key: made[item.key] for item in items if _stands(made.get(item.key), task, names)}
    fresh = [item for item in items if item.key not in kept or task.moved]
    arrived = iter(source.records(fresh))
    every = frozenset(stage.name for stage in stages)
    later = frozenset(names[task.start :])
    again = frozenset(item.key for item in fresh)
    for item in items:
        fields = source.gives(item)
        given = frozenset(stage.name for stage in stages if fields.issuperset(stage.provides))
        old, new = kept.get(item.key), next(arrived) if item.key in again else None
        if old is not None and (new is None or source.same(old, new)):
            yield Work(old, later - given)
        else:
            assert new is not None, "an input is kept, or it is read"
            yield Work(new, every - given)


def _stands(record: Record | None, task: ShardTask, names: Sequence[str]) -> bool:
    """True if what was made of an unchanged input stands: it isn't to be tried again, nor ended where things change."""
    return (
        record is not None
        and record.reason not in task.retry
        and (record.ok or record.stage not in names[task.start :])
    )
