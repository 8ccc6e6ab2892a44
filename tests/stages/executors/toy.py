"""A job without a data set: a few records for each task, and two stages that write texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.chains import SleepConfig, SleepStage
from configs.schema import RayConfig
from stages.base import PendingRecord, Stage, StageNames
from stages.executors.job import ChainReference, ExecutorSettings
from stages.record import Record, key_of
from stages.storage.manifest import ShardRun


class Coarse(SleepStage):
    name = "coarse"
    provides = ("caption",)

    def process(self, records: list[Record]) -> list[Record]:
        return [replace(record, caption=f"a {record.source}") for record in records]


class Fine(SleepStage):
    name = "fine"
    requires = ("caption",)
    provides = ("face_caption",)

    def process(self, records: list[Record]) -> list[Record]:
        return [replace(record, face_caption=f"{record.caption}, fine") for record in records]


def build(seconds: str) -> list[Stage]:
    """Returns both stages. seconds: time that a record takes in each stage."""
    return [Coarse(SleepConfig(float(seconds))), Fine(SleepConfig(float(seconds)))]


EVERY: StageNames = frozenset({"coarse", "fine"})


@dataclass(frozen=True)
class ToyTask:
    index: int
    inputs: int
    bytes: int = 0


@dataclass(frozen=True)
class Result:
    index: int
    texts: list[tuple[str, str]]
    run: ShardRun


_SETTINGS = ExecutorSettings(threads=1, stuck_after=60.0, ray=RayConfig())
_CHAIN = ChainReference("tests.stages.executors.toy:build", "0")


@dataclass(frozen=True)
class ToyJob:
    """The first record of each task has its result of `coarse` already."""

    settings: ExecutorSettings = _SETTINGS
    chain: ChainReference = _CHAIN

    def load(self, task: ToyTask, stages: Sequence[Stage]) -> Iterator[PendingRecord]:
        yield PendingRecord(replace(toy_record(task, 0), caption="known"), frozenset({"fine"}))
        for number in range(1, task.inputs):
            yield PendingRecord(toy_record(task, number), EVERY)

    def commit(self, task: ToyTask, records: Sequence[Record], run: ShardRun) -> Result:
        texts = [(record.caption, record.face_caption) for record in records]
        return Result(task.index, texts, run)


def toy_record(task: ToyTask, number: int) -> Record:
    name = f"{task.index}-{number}"
    return Record(key=key_of(name), source=name)


def expected_texts(task: ToyTask) -> list[tuple[str, str]]:
    """Returns the texts that ToyJob commits for the task."""
    captions = ["known", *(f"a {task.index}-{number}" for number in range(1, task.inputs))]
    return [(caption, f"{caption}, fine") for caption in captions]
