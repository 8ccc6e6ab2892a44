"""The Ray executor: the same shard tasks and stages on a cluster.

On Ray Data, one read task makes one block of one shard, and `target_max_block_size = None` keeps it
whole through the actors to the write task, which checks that it holds every planned row of exactly
one shard. Neighbouring stages with equal resources share an actor. Ray retries a dead task without
end, so a small actor on the driver's node counts the times that each shard was begun: after
`ray.deaths` deaths it is processed picture by picture in a child process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

import configs
from configs.errors import PipelineError
from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.planning.plan import ShardTask
from pipelines.planning.resume import load_shard
from stages.backends.runtime import pin_threads
from stages.base import run_chain, take_counts
from stages.executors.block import BLOCK_SCHEMA, Block
from stages.executors.counter import Advance, Relay, start_counter
from stages.executors.isolate import run_isolated
from stages.executors.placement import TASK_CPUS, Group, Node, plan_groups
from stages.record import Record
from stages.storage.commit import Manifest, ShardRun, commit
from stages.storage.store import Store

logger = logging.getLogger(__name__)

# by itself Ray ends a task's process after one idle second, and the next shard's imports for
# seconds
_IDLE_MS = 60_000


def run_ray(
    config: DatasetConfig, tasks: Sequence[ShardTask], advance: Advance, chain: Chain = build_chain
) -> Iterator[Manifest]:
    """Make the shards on Ray Data; yields each manifest when it is committed, in no particular
    order.
    """
    import ray

    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    _start_ray(config, address)
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [Node(given.get("CPU", 0.0), given.get("GPU", 0.0)) for given in resources]
        groups = plan_groups(config, chain(config), nodes, len(tasks))
        for group in groups:
            logger.info(
                "ray: %d × (%s), each %g CPU, %g GPU",
                group.copies,
                "+".join(group.names),
                group.cpus,
                group.gpus,
            )
        counter = start_counter()
        with Relay(counter, advance, config.stuck_after):
            yield from _stream(config, tasks, groups, counter, chain)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, PipelineError) else error) from None
    finally:
        ray.shutdown()


def _start_ray(config: DatasetConfig, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # its workers' news goes to its own log files
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address and address != "local":
        ray.init(address=address, runtime_env=_runtime_env(), **quiet)
        return
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        object_store_memory=config.ray.object_store_mb * 1_000_000,
        include_dashboard=False,
        _system_config={"idle_worker_killing_time_threshold_ms": _IDLE_MS},
        **quiet,
    )


def _runtime_env() -> dict[str, Any] | None:
    """This program's own packages, so that workers need only the image with its requirements.

    None inside `ray job submit`, whose working directory holds them already.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    root = Path(configs.__file__).parents[1]
    return {
        "py_modules": [str(root / name) for name in ("configs", "stages", "model", "pipelines")]
    }


def _stream(
    config: DatasetConfig,
    tasks: Sequence[ShardTask],
    groups: Sequence[Group],
    counter: Any,
    chain: Chain,
) -> Iterator[Manifest]:
    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # its own wrapper forgets the cause, and with it whose fault it was
    context.raise_original_map_exception = True
    # each costs a process that imports for seconds: a storm of them starves actors
    at_once = -(-groups[0].copies // 2)
    data = ray.data.read_datasource(
        _shard_source(config, tasks, chain),
        override_num_blocks=len(tasks),
        num_cpus=TASK_CPUS,
        concurrency=at_once,
    )
    for group in groups:
        data = data.map_batches(
            _GroupActor,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=(config, group, counter, chain),
            compute=ray.data.ActorPoolStrategy(size=group.copies, max_tasks_in_flight_per_actor=2),
            num_cpus=group.cpus,
            num_gpus=group.gpus or None,
        )
    signatures = [stage.signature() for stage in chain(config)]
    data = data.map_batches(
        _write,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"output": config.output, "signatures": signatures},
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=at_once),
    )
    for row in data.iter_rows():
        yield json.loads(row["manifest"])


def _shard_source(config: DatasetConfig, tasks: Sequence[ShardTask], chain: Chain) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class ShardSource(Datasource):  # type: ignore[misc]
        """One read task, and so one block, for each shard."""

        def estimate_inmemory_data_size(self) -> int:
            return sum(task.shard.bytes for task in tasks)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
        ) -> list[Any]:
            return [
                ReadTask(_reader(config, task, chain), self._metadata(task), BLOCK_SCHEMA)
                for task in tasks
            ]

        def _metadata(self, task: ShardTask) -> Any:
            return BlockMetadata(
                num_rows=task.shard.inputs, size_bytes=task.shard.bytes, exec_stats=None
            )

    return ShardSource()


def _reader(config: DatasetConfig, task: ShardTask, chain: Chain) -> Callable[[], list[pa.Table]]:
    def read() -> list[pa.Table]:
        started = time.time()
        work = list(load_shard(config, Store(config.output), task, chain(config)))
        run = {
            "started": started,
            "seconds": {"source": time.time() - started},
            "attempt": 1,
            "counts": {},
        }
        return [
            Block(
                [item.record for item in work],
                [item.remaining_stages for item in work],
                task.shard,
                run,
            ).to_arrow()
        ]

    return read


class _GroupActor:
    """A group of stages, each loaded once, that takes and gives whole shards."""

    def __init__(self, config: DatasetConfig, group: Group, counter: Any, chain: Chain) -> None:
        self._threads = config.threads or 1
        pin_threads(self._threads)
        self._config, self._group, self._counter, self._chain = config, group, counter, chain
        stages = chain(config)
        self._stages, self._last = stages[group.first : group.last], group.last == len(stages)

    def __call__(self, arrived: pa.Table) -> pa.Table:
        import ray

        block = Block.of_arrow(arrived)
        shard, run = block.shard.index, block.run
        every = {stage.name for stage in self._stages}
        # else each stage loads its model when there is work for it
        if any(every <= remaining_stages for remaining_stages in block.remaining_stages):
            for stage in self._stages:
                stage.setup()
        if self._group.first == 0:
            run["started"] = time.time()  # a shard's time begins once its models are loaded
        attempt = ray.get(self._counter.begin.remote(shard, self._group.first))
        run["attempt"] = max(run["attempt"], attempt)
        advance = self._counter.advance.remote if self._last else (lambda count: None)
        if attempt > self._config.ray.deaths:
            name = f"{self._chain.__module__}:{self._chain.__qualname__}"
            given = (block.records, block.remaining_stages, self._threads, advance, name)
            done = run_isolated(self._config, self._stages, *given)
        else:
            done = self._run(block, advance)
            run["counts"] |= take_counts(self._stages)
        self._counter.end.remote(shard, self._group.first)
        return Block(done, block.remaining_stages, block.shard, run).to_arrow()

    def _run(self, block: Block, advance: Advance) -> list[Record]:
        """The stages in this process. It ends itself where one hangs: faulthandler's clock needs no
        Python thread.
        """
        limit, where = self._config.stuck_after, f"{platform.node()}, process {os.getpid()}"

        def entering(stage: str) -> None:
            faulthandler.dump_traceback_later(limit, exit=True)
            self._counter.at.remote(block.shard.index, stage, where)

        try:
            return run_chain(
                self._stages,
                block.records,
                block.run["seconds"],
                advance,
                block.remaining_stages,
                entering,
            )
        finally:
            faulthandler.cancel_dump_traceback_later()


def _write(arrived: pa.Table, output: str, signatures: Sequence[str]) -> pa.Table:
    block = Block.of_arrow(arrived)
    run = block.run
    facts = ShardRun(run["seconds"], "ray", run["started"], run["attempt"], run["counts"])
    manifest = commit(Store(output), block.shard, block.records, signatures, facts)
    return pa.table({"manifest": [json.dumps(manifest)]})
