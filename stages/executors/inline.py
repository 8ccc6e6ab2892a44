"""The inline executor: one shard after another in this process. For small jobs, for tests, and as
the reference for the bytes that other executors must produce.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from stages.backends.runtime import pin_threads
from stages.base import PendingRecord, chunk_size, run_chain, take_counts
from stages.executors.job import Advance, ResultT, ShardJob, TaskT
from stages.record import Record
from stages.storage.manifest import ShardRun


def run_inline(
    job: ShardJob[TaskT, ResultT], tasks: Sequence[TaskT], advance: Advance
) -> Iterator[ResultT]:
    """Yields the result of each task, in order, when it is committed."""
    pin_threads(job.settings.threads)
    stages = job.chain.build()
    for task in tasks:
        started, seconds = time.time(), dict[str, float]()
        finished: list[Record] = []
        for chunk in _chunks(job.load(task, stages), chunk_size(stages), seconds):
            finished += run_chain(
                stages,
                [item.record for item in chunk],
                seconds,
                advance,
                [item.remaining_stages for item in chunk],
            )
        run = ShardRun(seconds, "inline", started, counts=take_counts(stages))
        yield job.commit(task, finished, run)


def _chunks(
    items: Iterator[PendingRecord], size: int, seconds: dict[str, float]
) -> Iterator[list[PendingRecord]]:
    """Yields `size` items at a time; adds the time spent on loading them to `seconds["source"]`."""
    while True:
        started = time.time()
        chunk = list(islice(items, size))
        seconds["source"] = seconds.get("source", 0.0) + time.time() - started
        if not chunk:
            return
        yield chunk
