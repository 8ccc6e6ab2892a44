"""The Ray executor: the same tasks and stages as inline, on a cluster.

On Ray Data, one read task makes one block of one shard. `target_max_block_size = None` keeps the
block whole on its way through the workers to the write task, which checks that it holds every
record of exactly one shard. Consecutive stages with equal resources share a worker. Ray retries a
task whose worker died without limit, so an actor on the driver's node counts how often each shard
was begun: after `ray.deaths` deaths it is processed record by record in a child process.
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa

from configs.errors import PipelineError
from stages.executors.block import BLOCK_SCHEMA, Block
from stages.executors.cluster import list_nodes, ray_cluster, start_on_this_node
from stages.executors.counter import Counter, ProgressRelay, poll_counter
from stages.executors.job import Advance, ResultT, ShardJob, Task, TaskT
from stages.executors.placement import TASK_CPUS, Group, plan_groups
from stages.executors.worker import GroupActor
from stages.storage.manifest import ShardRun

logger = logging.getLogger(__name__)


_RAYS_LINES: Final = "\nFailed to "
_LOGGERS: Final = ("ray.data._internal.execution.streaming_executor_state", "ray.data.exceptions")


def _without_user_errors(record: logging.LogRecord) -> bool:
    """A filter of Ray's loggers: leaves out tracebacks of a PipelineError, which the caller prints
    in one line.
    """
    error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
    return not isinstance(error, PipelineError)


def run_ray(
    job: ShardJob[TaskT, ResultT], tasks: Sequence[TaskT], advance: Advance
) -> Iterator[ResultT]:
    """Yields the result of each task when it is committed, in no particular order."""
    import ray

    settings = job.settings
    try:
        with ray_cluster(settings.ray):
            groups = plan_groups(job.chain.build(), list_nodes(), settings.ray.workers, len(tasks))
            for group in groups:
                logger.info(
                    "ray: %d × (%s), each %g CPU, %g GPU",
                    group.workers,
                    "+".join(group.names),
                    group.cpus,
                    group.gpus,
                )
            counter = start_on_this_node(Counter)
            with ProgressRelay(partial(poll_counter, counter, settings.stuck_after), advance):
                yield from _stream(job, tasks, groups, counter)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, PipelineError):
            raise error from None
        # Ray adds lines about its own settings to the message
        raise type(cause)(str(cause).partition(_RAYS_LINES)[0]) from None


def _stream(
    job: ShardJob[TaskT, ResultT], tasks: Sequence[TaskT], groups: Sequence[Group], counter: Any
) -> Iterator[ResultT]:
    import ray

    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_without_user_errors)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray's own wrapper of an error would lose the cause, which run_ray raises
    context.raise_original_map_exception = True
    # each read or write task costs a process that imports for seconds; many at once starve workers
    concurrency = -(-groups[0].workers // 2)
    data = ray.data.read_datasource(
        _datasource(job, tasks),
        override_num_blocks=len(tasks),
        num_cpus=TASK_CPUS,
        concurrency=concurrency,
    )
    for group in groups:
        data = data.map_batches(
            GroupActor,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=(job, group, counter),
            compute=ray.data.ActorPoolStrategy(size=group.workers, max_tasks_in_flight_per_actor=2),
            num_cpus=group.cpus,
            num_gpus=group.gpus or None,
        )
    data = data.map_batches(
        _write,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"job": job},
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=concurrency),
    )
    for row in data.iter_rows():
        # this program's own bytes, from `_write`
        yield pickle.loads(row["result"])  # noqa: S301


def _datasource(job: ShardJob[TaskT, Any], tasks: Sequence[TaskT]) -> Any:
    """Returns a Ray Datasource with one read task, and so one block, for each shard."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class ShardSource(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int:
            return sum(task.bytes for task in tasks)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
        ) -> list[Any]:
            return [
                ReadTask(_reader(job, task), self._metadata(task), BLOCK_SCHEMA) for task in tasks
            ]

        def _metadata(self, task: Task) -> Any:
            return BlockMetadata(num_rows=task.inputs, size_bytes=task.bytes, exec_stats=None)

    return ShardSource()


def _reader(job: ShardJob[TaskT, Any], task: TaskT) -> Callable[[], list[pa.Table]]:
    def read() -> list[pa.Table]:
        started = time.time()
        items = list(job.load(task, job.chain.build()))
        run = ShardRun({"source": time.time() - started}, "ray", started)
        block = Block(
            [item.record for item in items], [item.remaining_stages for item in items], task, run
        )
        return [block.to_arrow()]

    return read


def _write(table: pa.Table, job: ShardJob[Any, Any]) -> pa.Table:
    block = Block.from_arrow(table)
    result = job.commit(block.task, block.records, block.run)
    return pa.table({"result": [pickle.dumps(result)]})
