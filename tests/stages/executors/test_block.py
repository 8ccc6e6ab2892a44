"""A shard as an Arrow table: nothing is lost, and anything but one whole shard is refused."""

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
    given = block(ToyTask(5, inputs, 123))
    table = given.to_arrow()
    assert table.schema.equals(BLOCK_SCHEMA) and table.num_rows == inputs
    read = Block.from_arrow(table)
    assert [record.key for record in read.records] == [record.key for record in given.records]
    assert read.remaining_stages == given.remaining_stages
    assert (read.task, read.run) == (given.task, given.run)


def test_anything_but_one_whole_shard_is_an_error() -> None:
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
