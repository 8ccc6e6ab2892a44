"""The inline executor: shards one by one in this process. For small jobs, tests, and as the
standard of bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.planning.plan import ShardTask
from pipelines.planning.resume import PendingRecord, load_shard
from stages.backends.runtime import pin_threads
from stages.base import chunk_size, run_chain, take_counts
from stages.executors.counter import Advance
from stages.record import Record
from stages.storage.commit import Manifest, ShardRun, commit
from stages.storage.store import Store


def run_inline(
    config: DatasetConfig, tasks: Sequence[ShardTask], advance: Advance, chain: Chain = build_chain
) -> Iterator[Manifest]:
    """Make the shards one after another in this process; yields each manifest when it is committed."""
    pin_threads(config.threads)
    store, stages = Store(config.output), chain(config)
    signatures = [stage.signature() for stage in stages]
    for task in tasks:
        started, seconds = time.time(), dict[str, float]()
        done: list[Record] = []
        for part in _parts(load_shard(config, store, task, stages), chunk_size(stages), seconds):
            done += run_chain(
                stages,
                [item.record for item in part],
                seconds,
                advance,
                [item.remaining_stages for item in part],
            )
        facts = ShardRun(seconds, "inline", started, counts=take_counts(stages))
        yield commit(store, task.shard, done, signatures, facts)


def _parts(
    work: Iterator[PendingRecord], count: int, seconds: dict[str, float]
) -> Iterator[list[PendingRecord]]:
    """`count` of `work` at a time; the time that passes until they are there is the source's."""
    while True:
        began = time.time()
        part = list(islice(work, count))
        seconds["source"] = seconds.get("source", 0.0) + time.time() - began
        if not part:
            return
        yield part
