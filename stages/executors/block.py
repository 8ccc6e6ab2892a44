"""Block: one whole shard as one Arrow table, on its way through Ray Data."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from configs.errors import ShardError
from stages.base import StageNames
from stages.executors.job import Task
from stages.record import ARROW_SCHEMA, Record, from_table, to_table
from stages.storage.manifest import ShardRun

_EXTRA: Final = [
    ("shard", pa.int32()),
    ("remaining_stages", pa.string()),  # comma-separated
    ("row", pa.int32()),
    ("rows", pa.int32()),
    ("header", pa.binary()),  # task and run, pickled, in the first row; empty in the others
]
BLOCK_SCHEMA = pa.schema([*ARROW_SCHEMA, *(pa.field(name, kind) for name, kind in _EXTRA)])


@dataclass(frozen=True, slots=True)
class Block:
    """remaining_stages: for each record. run: of the shard, so far."""

    records: list[Record]
    remaining_stages: list[StageNames]
    task: Any  # a stages.executors.job.Task
    run: ShardRun

    def to_arrow(self) -> pa.Table:
        """Returns one row for each record, columns BLOCK_SCHEMA."""
        count = len(self.records)
        task: Task = self.task
        header = pickle.dumps((task, self.run))
        columns = (
            [task.index] * count,
            [",".join(sorted(names)) for names in self.remaining_stages],
            list(range(count)),
            [count] * count,
            [header, *[b""] * (count - 1)],
        )
        table = to_table(self.records)
        for (name, kind), values in zip(_EXTRA, columns, strict=True):
            table = table.append_column(name, pa.array(values, kind))
        return table

    @staticmethod
    def from_arrow(table: pa.Table) -> Block:
        """Raises ShardError unless the table is exactly one whole shard, in order."""
        shards, rows = set(table["shard"].to_pylist()), table["row"].to_pylist()
        if len(shards) != 1 or rows != list(range(table["rows"][0].as_py())):
            raise ShardError(
                f"Ray Data passed on {len(rows)} rows of shards {sorted(shards)} as one block; "
                "expected all rows of one shard, in order. Run again; if it happens again, report "
                "it with the version of Ray."
            )
        # this program's own bytes, written by `to_arrow` in another worker of the run
        task, run = pickle.loads(table["header"][0].as_py())  # noqa: S301
        remaining_stages = [
            frozenset(filter(None, names.split(",")))
            for names in table["remaining_stages"].to_pylist()
        ]
        records = from_table(table.select(ARROW_SCHEMA.names))
        return Block(records, remaining_stages, task, run)
