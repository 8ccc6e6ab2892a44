"""Block: one whole shard as one Arrow table, on its way through Ray Data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa

from configs.errors import ShardError
from stages.base import StageNames
from stages.record import ARROW_SCHEMA, Record, from_table, to_table
from stages.storage.commit import PlannedShard

_EXTRA: Final = [
    ("shard", pa.int32()),
    ("remaining_stages", pa.string()),
    ("row", pa.int32()),
    ("rows", pa.int32()),
    ("run", pa.string()),
]
BLOCK_SCHEMA = pa.schema([*ARROW_SCHEMA, *(pa.field(name, kind) for name, kind in _EXTRA)])


@dataclass(frozen=True, slots=True)
class Block:
    """One whole shard on its way through the engine; run: what its manifest will say of this run."""

    records: list[Record]
    remaining_stages: list[StageNames]
    shard: PlannedShard
    run: dict[str, Any]

    def to_arrow(self) -> pa.Table:
        """`row` of `rows` lets the write task see that nothing is missing; shard and run stand in
        the first row.
        """
        count, empty = len(self.records), [""] * (len(self.records) - 1)
        remaining_stages = [",".join(sorted(names)) for names in self.remaining_stages]
        run = [json.dumps({"shard": asdict(self.shard), "run": self.run}), *empty]
        extra = (
            [self.shard.index] * count,
            remaining_stages,
            list(range(count)),
            [count] * count,
            run,
        )
        table = to_table(self.records)
        for (name, kind), values in zip(_EXTRA, extra, strict=True):
            table = table.append_column(name, pa.array(values, kind))
        return table

    @staticmethod
    def of_arrow(block: pa.Table) -> Block:
        """Raises ShardError unless it is exactly one whole shard, in order."""
        shards, rows = set(block["shard"].to_pylist()), block["row"].to_pylist()
        if len(shards) != 1 or rows != list(range(block["rows"][0].as_py())):
            raise ShardError(
                f"the engine gave {len(rows)} rows of shards {sorted(shards)} as one block; "
                "expected one shard"
            )
        told = json.loads(block["run"][0].as_py())
        remaining_stages = [
            frozenset(filter(None, names.split(",")))
            for names in block["remaining_stages"].to_pylist()
        ]
        records = from_table(block.select(ARROW_SCHEMA.names))
        return Block(records, remaining_stages, PlannedShard(**told["shard"]), told["run"])
