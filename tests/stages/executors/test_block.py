"""A shard as an Arrow table: it is read back unchanged, and other tables are errors."""

from __future__ import annotations

import pyarrow as pa
import pytest

from configs.errors import ShardError
from stages.executors.block import BLOCK_SCHEMA, Block
from stages.storage.manifest import ShardRun
from tests.stages.executors.toy import EVERY, ToyTask, toy_record


def block(task: ToyTask) -> Block:
    run = ShardRun({"source": 0.5}, "ray", 7.0, 2, {"caption": {"tokens": 3}})
    needs = [frozenset[str](), frozenset({"fine"}), EVERY][: task.inputs]
    return Block([toy_record(task, number) for number in range(task.inputs)], needs, task, run)


@pytest.mark.parametrize("inputs", [1, 3])
def test_round_trip(inputs: int) -> None:
    original = block(ToyTask(5, inputs, 123))
    table = original.to_arrow()
    assert table.schema.equals(BLOCK_SCHEMA) and table.num_rows == inputs
    decoded = Block.from_arrow(table)
    assert [record.key for record in decoded.records] == [record.key for record in original.records]
    assert decoded.remaining_stages == original.remaining_stages
    assert (decoded.task, decoded.run) == (original.task, original.run)


def test_a_table_that_is_not_exactly_one_shard_is_an_error() -> None:
    whole = block(ToyTask(5, 3)).to_arrow()
    wrong = {
        "a missing row": whole.slice(0, 2),
        "a missing first row": whole.slice(1),
        "another order": whole.take([1, 0, 2]),
        "a row twice": whole.take([0, 1, 1]),
        "two shards": pa.concat_tables([whole, block(ToyTask(6, 3)).to_arrow()]),
        "the same shard twice": pa.concat_tables([whole, whole]),
    }
    for name, table in wrong.items():
        with pytest.raises(ShardError, match=f"{table.num_rows} rows of shards"):
            Block.from_arrow(table)
            pytest.fail(name)
