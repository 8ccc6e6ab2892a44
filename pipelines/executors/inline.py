"""The inline executor: shards one by one in this process. For small jobs, tests, and as the standard of bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from configs.schema import DatasetConfig
from pipelines.executors.counter import Advance
from pipelines.load import load_shard
from pipelines.plan import ShardTask
from pipelines.shards import Manifest, ShardRun, commit
from pipelines.store import Store
from stages.backends.runtime import pin_threads
from stages.base import run_chain
from stages.chain import Chain, build_stages


def run_inline(
    config: DatasetConfig, tasks: Sequence[ShardTask], advance: Advance, chain: Chain = build_stages
) -> Iterator[Manifest]:
    """Make the shards one after another in this process; yields each manifest when it is committed."""
    pin_threads(config.threads)
    store, stages = Store(config.output), chain(config)
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
