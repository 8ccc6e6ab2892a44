"""The contract between an executor and its caller: what to load, process and commit.

A caller (data sets in `pipelines`, for example) implements ShardJob. The executor knows nothing of
where records come from and where results go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Protocol, TypeVar

from configs.schema import RayConfig
from stages.base import PendingRecord, Stage
from stages.record import Record
from stages.storage.manifest import ShardRun

Advance = Callable[[int], None]  # called with the number of records finished since the last call


class Task(Protocol):
    """One shard: the unit of work, of retries and of progress. Must be picklable."""

    @property
    def index(self) -> int:
        """Unique among the tasks of a run."""
        ...

    @property
    def inputs(self) -> int:
        """Number of records, at least 1."""
        ...

    @property
    def bytes(self) -> int:
        """Estimated size of the records in memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorSettings:
    """threads: of each model in one process; 0: all cores inline, one on Ray. stuck_after: seconds
    that a stage may take over one chunk of records (stages.base.chunk_size).
    """

    threads: int
    stuck_after: float
    ray: RayConfig


@dataclass(frozen=True, slots=True)
class ChainReference:
    """How to build a chain of stages in any process, without unpickling.

    function: "module:name" of a function that takes `text` and returns the stages, in order.
    """

    function: str
    text: str

    def build(self) -> list[Stage]:
        """Returns the stages; no weights are loaded yet."""
        function: Callable[[str], list[Stage]] = resolve_name(self.function)
        return function(self.text)


TaskT = TypeVar("TaskT", bound=Task)
ResultT = TypeVar("ResultT")
TaskT_contra = TypeVar("TaskT_contra", bound=Task, contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)


class ShardJob(Protocol[TaskT_contra, ResultT_co]):
    """Must be picklable: Ray sends it to every worker.

    `load` and `commit` may run several times for one task, each in another process: a later commit
    must replace an earlier one.
    """

    @property
    def settings(self) -> ExecutorSettings: ...

    @property
    def chain(self) -> ChainReference: ...

    def load(self, task: TaskT_contra, stages: Sequence[Stage]) -> Iterator[PendingRecord]:
        """Yields the task's records, in order. stages: those that `chain` builds."""
        ...

    def commit(self, task: TaskT_contra, records: Sequence[Record], run: ShardRun) -> ResultT_co:
        """Stores all records of a finished task, in order; returns a picklable result."""
        ...


class Executor(Protocol):
    """Runs the tasks of a job; yields each result of `commit`. The order is up to the executor."""

    def __call__(
        self, job: ShardJob[TaskT, ResultT], tasks: Sequence[TaskT], advance: Advance
    ) -> Iterator[ResultT]: ...
