"""A preview: captions of the first pictures of a planned run. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from pipelines.dataset_job import build_from_text, chain_reference, executor_settings
from pipelines.planning.resume import load_shard
from pipelines.run import Job
from stages.annotations import Answers
from stages.backends.runtime import pin_threads
from stages.base import PendingRecord, Stage, run_chain
from stages.caption import CaptionStage
from stages.executors import executor_named
from stages.executors.job import ChainReference, ExecutorSettings
from stages.record import Record
from stages.storage.manifest import ShardRun

PICTURES: Final = 3
_INPUTS: Final = 12  # that are tried: some show no face
_SHARDS: Final = 3  # that are searched for inputs without a caption


@dataclass(frozen=True, slots=True)
class Preview:
    """records: as the caption stage made them; if no input reached it, those that were tried.
    seconds: of captioning one picture, without loading the model.
    """

    records: list[Record]
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yields the lines to print."""
        for record in self.records:
            yield f"  {record.source}"
            if not record.ok:
                yield f"    {record.status}: {record.reason} {record.detail}".rstrip()
                continue
            answers = record.annotation(Answers)
            for index, text in enumerate((record.caption, record.face_caption)):
                yield f"    {'face caption' if index else 'caption'}: {text}"
                if answers and (verdicts := answers.answer_verdicts[index]):
                    yield f"      removed from the answer: {verdicts}"
                if answers and (verdicts := answers.first_verdicts[index]):
                    yield f"      of a second try, since the first answer was useless: {verdicts}"
        if self.seconds:
            yield f"  {self.seconds:.2f} s a picture, after the model was loaded"


@dataclass(frozen=True, slots=True)
class _Task:
    """A stages.executors.job.Task: one shard of the records that are captioned."""

    inputs: int
    bytes: int
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _CaptionJob:
    """A stages.executors.job.ShardJob that captions records and returns them."""

    settings: ExecutorSettings
    chain: ChainReference
    records: list[Record]

    def load(self, task: _Task, stages: Sequence[Stage]) -> Iterator[PendingRecord]:
        names = frozenset(stage.name for stage in stages)
        return (PendingRecord(record, names) for record in self.records)

    def commit(self, task: _Task, records: Sequence[Record], run: ShardRun) -> Preview:
        seconds = run.seconds.get(CaptionStage.name, 0.0)
        return Preview(list(records), seconds / len(records))


def preview(job: Job) -> Preview | None:
    """Captions up to PICTURES of the inputs that the job would caption; None if there are none.

    The stages before run in this process. The captioner runs where the run's own would, if it needs
    a GPU, else in this process too. Raises the errors of a run.
    """
    names = [stage.name for stage in job.stages]
    if CaptionStage.name not in names:
        return None
    place = names.index(CaptionStage.name)
    needs_gpu = job.stages[place].resources.gpus > 0
    pending = islice(_to_caption(job), _INPUTS)
    pin_threads(job.config.threads)
    rejected: list[Record] = []
    ready: list[Record] = []
    while len(ready) < PICTURES and (part := list(islice(pending, PICTURES - len(ready)))):
        stages, needs = job.stages[:place], [item.remaining_stages for item in part]
        for record in run_chain(stages, [item.record for item in part], None, None, needs):
            (ready if record.ok else rejected).append(record)
    if not ready:
        return Preview(rejected[:PICTURES], 0.0) if rejected else None
    job.stages[place].preflight()
    return caption(job, ready, job.config.executor if needs_gpu else "inline")


def caption(job: Job, records: list[Record], executor: str) -> Preview:
    """Captions records that have passed the stages before, on an executor."""
    text = chain_reference(job.config, job.chain).text
    chain = ChainReference("pipelines.preview:build_captioner", text)
    settings = executor_settings(job.config)
    captions = _CaptionJob(settings=settings, chain=chain, records=records)
    task = _Task(len(records), sum(len(record.image) for record in records))
    [result] = executor_named(executor)(captions, [task], lambda count: None)
    return result


def build_captioner(text: str) -> list[Stage]:
    """Returns the caption stage alone, of the chain that `text` describes."""
    return [stage for stage in build_from_text(text) if stage.name == CaptionStage.name]


def _to_caption(job: Job) -> Iterator[PendingRecord]:
    """Yields the records of the first shards that need a caption, in order."""
    tasks = (task for task in job.tasks if task.may_need(CaptionStage.name))
    for task in islice(tasks, _SHARDS):
        items = job.plan.inputs_of(task.index)
        for pending in load_shard(job.config, job.store, task, job.stages, items):
            if pending.record.ok and CaptionStage.name in pending.remaining_stages:
                yield pending
