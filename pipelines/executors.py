"""Executors: the same shard tasks, the same stages, the same bytes, in this process or on a Ray cluster.

On Ray Data, one read task makes one block of one shard, and `target_max_block_size = None` keeps it whole through the
actors to the write task, which checks that it holds every planned row of exactly one shard. Neighbouring stages with
equal resources share an actor. Ray retries a dead task without end, so a small actor on the driver's node counts the
times that each shard was begun: after `ray.deaths` deaths it is processed picture by picture in a child process.

Only this module imports ray.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa

from configs.errors import ConfigError, PipelineError, ShardError
from configs.schema import DatasetConfig
from pipelines.isolate import run_isolated
from pipelines.load import load_shard
from pipelines.plan import ShardTask
from pipelines.shards import PlannedShard, ShardRun, commit
from pipelines.store import Store
from stages.backends.runtime import pin_threads
from stages.base import Stage, Todo, run_chain
from stages.chain import build_stages
from stages.record import ARROW_SCHEMA, Record, from_table, to_table

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]  # told how many more records are done
Manifest = dict[str, Any]

_TASK_CPUS = 0.25  # of a read or write task
_SPARE_CPUS = 2 * _TASK_CPUS  # kept free of actors: with none left, reads could never start and the run would hang


def run_inline(config: DatasetConfig, tasks: Sequence[ShardTask], advance: Advance) -> Iterator[Manifest]:
    """Make the shards one after another in this process; yields each manifest when it is committed."""
    pin_threads(config.threads)
    store, stages = Store(config.output), build_stages(config)
    signatures = [stage.signature() for stage in stages]
    ready: set[str] = set()
    for task in tasks:
        started, seconds = time.time(), dict[str, float]()
        work = load_shard(config, store, task, stages)
        seconds["source"] = time.time() - started
        needed = {name for item in work if item.record.ok for name in item.todo}
        for stage in stages:
            if stage.name in needed - ready:
                stage.setup()
        ready |= needed
        done = run_chain(stages, [item.record for item in work], seconds, advance, [item.todo for item in work])
        yield commit(store, task.shard, done, signatures, ShardRun(seconds, "inline", started))


# ----------------------------------------------------------------------------------------------------------- Ray


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring stages that share an actor: chain[first:last], with what one copy holds, and how many copies."""

    first: int
    last: int
    names: tuple[str, ...]
    cpus: float
    gpus: float
    copies: int


def plan_groups(config: DatasetConfig, stages: Sequence[Stage], cpus: float, gpus: float) -> list[Group]:
    """Fit the actors into a cluster's free resources, leaving room for read and write tasks.

    Copies are shared out evenly and shrunk to fit; where not even one of each fits, so are their fractions of a CPU.
    Raises ConfigError where GPUs are asked for that the cluster doesn't have.
    """
    runs = [list(run) for _, run in groupby(enumerate(stages), lambda pair: _holds(pair[1]))]
    needs = [_holds(run[0][1]) for run in runs]
    if sum(need[1] for need in needs) > gpus + 1e-9:
        wanted = ", ".join(f"{run[0][1].name}: {need[1]:g}" for run, need in zip(runs, needs, strict=True) if need[1])
        raise ConfigError(
            f"the stages ask for {sum(n[1] for n in needs):g} GPUs ({wanted}), the cluster has {gpus:g}. "
            "Lower their placement.gpus, or start nodes that have them."
        )
    room = cpus - _SPARE_CPUS
    total = sum(need[0] for need in needs)
    if room <= 0:
        raise ConfigError(f"the cluster has {cpus:g} CPUs, expected over {_SPARE_CPUS:g}. Start a node with more.")
    shrink = min(1.0, room / total)
    copies = config.ray.workers or max(1, int(room / total + 1e-9))
    copies = max(1, min(copies, int(room / (total * shrink) + 1e-9)))
    on_gpus = sum(need[1] for need in needs)
    copies = max(1, min(copies, int(gpus / on_gpus + 1e-9))) if on_gpus else copies
    return [
        Group(run[0][0], run[-1][0] + 1, tuple(s.name for _, s in run), round(need[0] * shrink, 4), need[1], copies)
        for run, need in zip(runs, needs, strict=True)
    ]


def run_ray(config: DatasetConfig, tasks: Sequence[ShardTask], advance: Advance) -> Iterator[Manifest]:
    """Make the shards on Ray Data; yields each manifest when it is committed, in no particular order."""
    import ray

    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    _start_ray(config, address)
    try:
        resources = ray.cluster_resources()
        groups = plan_groups(config, build_stages(config), resources.get("CPU", 0.0), resources.get("GPU", 0.0))
        for group in groups:
            logger.info(
                "ray: %d × (%s), each %g CPU, %g GPU", group.copies, "+".join(group.names), group.cpus, group.gpus
            )
        counter = ray.remote(num_cpus=0)(Counter).remote()
        with _Relay(counter, advance):
            yield from _stream(config, tasks, groups, counter)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, PipelineError) else error) from None
    finally:
        ray.shutdown()


def _holds(stage: Stage) -> tuple[float, float]:
    return stage.resources.cpus, stage.resources.gpus


def _start_ray(config: DatasetConfig, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its workers' news goes to its own log files
    for noisy in ("ray", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address and address != "local":
        ray.init(address=address, **quiet)
        return
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        object_store_memory=config.ray.object_store_mb * 1_000_000,
        include_dashboard=False,
        **quiet,
    )


def _stream(
    config: DatasetConfig, tasks: Sequence[ShardTask], groups: Sequence[Group], counter: Any
) -> Iterator[Manifest]:
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing ray.data has set it anew
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    at_once = -(-groups[0].copies // 2)  # each costs a process that imports for seconds: a storm of them starves actors
    data = ray.data.read_datasource(
        _shard_source(config, tasks), override_num_blocks=len(tasks), num_cpus=_TASK_CPUS, concurrency=at_once
    )
    for group in groups:
        data = data.map_batches(
            _GroupActor,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=(config, group, counter),
            compute=ray.data.ActorPoolStrategy(size=group.copies, max_tasks_in_flight_per_actor=2),
            num_cpus=group.cpus,
            num_gpus=group.gpus or None,
        )
    signatures = [stage.signature() for stage in build_stages(config)]
    data = data.map_batches(
        _write,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"output": config.output, "signatures": signatures},
        num_cpus=_TASK_CPUS,
        concurrency=at_once,
    )
    for row in data.iter_rows():
        yield json.loads(row["manifest"])


_EXTRA = [("shard", pa.int32()), ("todo", pa.string()), ("row", pa.int32()), ("rows", pa.int32()), ("run", pa.string())]
_BLOCK_SCHEMA = pa.schema([*ARROW_SCHEMA, *(pa.field(name, kind) for name, kind in _EXTRA)])


@dataclass(frozen=True, slots=True)
class _Block:
    """One whole shard on its way through the engine; run: what its manifest will say of this run."""

    records: list[Record]
    todo: list[Todo]
    shard: PlannedShard
    run: dict[str, Any]

    def to_arrow(self) -> pa.Table:
        """`row` of `rows` lets the write task see that nothing is missing; shard and run stand in the first row."""
        count, empty = len(self.records), [""] * (len(self.records) - 1)
        todo = [",".join(sorted(names)) for names in self.todo]
        run = [json.dumps({"shard": asdict(self.shard), "run": self.run}), *empty]
        extra = ([self.shard.index] * count, todo, list(range(count)), [count] * count, run)
        table = to_table(self.records)
        for (name, kind), values in zip(_EXTRA, extra, strict=True):
            table = table.append_column(name, pa.array(values, kind))
        return table

    @staticmethod
    def of_arrow(block: pa.Table) -> _Block:
        """Raises ShardError unless it is exactly one whole shard, in order."""
        shards, rows = set(block["shard"].to_pylist()), block["row"].to_pylist()
        if len(shards) != 1 or rows != list(range(block["rows"][0].as_py())):
            raise ShardError(
                f"the engine gave {len(rows)} rows of shards {sorted(shards)} as one block; expected one shard"
            )
        told = json.loads(block["run"][0].as_py())
        todo = [frozenset(filter(None, names.split(","))) for names in block["todo"].to_pylist()]
        records = from_table(block.select(ARROW_SCHEMA.names))
        return _Block(records, todo, PlannedShard(**told["shard"]), told["run"])


def _shard_source(config: DatasetConfig, tasks: Sequence[ShardTask]) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class ShardSource(Datasource):  # type: ignore[misc]
        """One read task, and so one block, for each shard."""

        def estimate_inmemory_data_size(self) -> int:
            return sum(task.shard.bytes for task in tasks)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
        ) -> list[Any]:
            return [ReadTask(_reader(config, task), self._metadata(task), _BLOCK_SCHEMA) for task in tasks]

        def _metadata(self, task: ShardTask) -> Any:
            return BlockMetadata(num_rows=task.shard.inputs, size_bytes=task.shard.bytes, exec_stats=None)

    return ShardSource()


def _reader(config: DatasetConfig, task: ShardTask) -> Callable[[], list[pa.Table]]:
    def read() -> list[pa.Table]:
        started = time.time()
        work = load_shard(config, Store(config.output), task, build_stages(config))
        run = {"started": started, "seconds": {"source": time.time() - started}, "attempt": 1}
        return [_Block([item.record for item in work], [item.todo for item in work], task.shard, run).to_arrow()]

    return read


class _GroupActor:
    """A group of stages, loaded once, that takes and gives whole shards."""

    def __init__(self, config: DatasetConfig, group: Group, counter: Any) -> None:
        self._threads = config.threads or 1
        pin_threads(self._threads)
        self._config, self._group, self._counter = config, group, counter
        chain = build_stages(config)
        self._stages, self._last = chain[group.first : group.last], group.last == len(chain)
        for stage in self._stages:
            stage.setup()

    def __call__(self, arrived: pa.Table) -> pa.Table:
        import ray

        block = _Block.of_arrow(arrived)
        shard, run = block.shard.index, block.run
        if self._group.first == 0:
            run["started"] = time.time()  # a shard's time begins once its models are loaded
        attempt = ray.get(self._counter.begin.remote(shard, self._group.first))
        run["attempt"] = max(run["attempt"], attempt)
        advance = self._counter.advance.remote if self._last else (lambda count: None)
        if attempt > self._config.ray.deaths:
            done = run_isolated(self._config, self._stages, block.records, block.todo, self._threads, advance)
        else:
            done = run_chain(self._stages, block.records, run["seconds"], advance, block.todo)
        self._counter.end.remote(shard, self._group.first)
        return _Block(done, block.todo, block.shard, run).to_arrow()


def _write(arrived: pa.Table, output: str, signatures: Sequence[str]) -> pa.Table:
    block = _Block.of_arrow(arrived)
    run = block.run
    facts = ShardRun(run["seconds"], "ray", run["started"], run["attempt"])
    manifest = commit(Store(output), block.shard, block.records, signatures, facts)
    return pa.table({"manifest": [json.dumps(manifest)]})


class Counter:
    """Lives outside the workers, so it survives them: how often each shard was begun, and how many records are done."""

    def __init__(self) -> None:
        self._begun: dict[tuple[int, int], int] = {}
        self._done = 0

    def begin(self, shard: int, group: int) -> int:
        """1 the first time, 2 after one worker has died of the shard, and so on."""
        self._begun[shard, group] = self._begun.get((shard, group), 0) + 1
        return self._begun[shard, group]

    def end(self, shard: int, group: int) -> None:
        self._begun[shard, group] = 0

    def advance(self, count: int) -> None:
        self._done += count

    def done(self) -> int:
        return self._done


class _Relay:
    """Carries the counter's progress to `advance`, twice a second, while the driver waits for shards."""

    def __init__(self, counter: Any, advance: Advance) -> None:
        self._counter, self._advance = counter, advance
        self._stop = threading.Event()
        self._seen = 0
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            self._poll()
        self._poll()

    def _poll(self) -> None:
        import ray

        try:
            done = ray.get(self._counter.done.remote(), timeout=5)
        except ray.exceptions.RayError:
            return  # progress is a courtesy: the run itself will say what is wrong
        if done > self._seen:
            self._advance(done - self._seen)
            self._seen = done


EXECUTORS: dict[str, Callable[[DatasetConfig, Sequence[ShardTask], Advance], Iterator[Manifest]]] = {
    "inline": run_inline,
    "ray": run_ray,
}
