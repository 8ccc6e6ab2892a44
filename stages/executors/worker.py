"""GroupActor: a Ray worker that runs a group of stages over whole shards.

It ends itself when a stage hangs. A shard that has ended its workers too often is processed record
by record in a child process.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import time
from dataclasses import replace
from typing import Any

import pyarrow as pa

from stages.backends.runtime import pin_threads
from stages.base import run_chain, take_counts
from stages.executors.block import Block
from stages.executors.isolate import Child, run_isolated
from stages.executors.job import Advance, ShardJob
from stages.executors.placement import Group
from stages.record import Record


class GroupActor:
    """Keeps the group's stages, and so their weights, from shard to shard.

    counter: the actor of a stages.executors.counter.Counter.
    """

    def __init__(self, job: ShardJob[Any, Any], group: Group, counter: Any) -> None:
        self._settings, self._chain = job.settings, job.chain
        self._threads = self._settings.threads or 1
        pin_threads(self._threads)
        self._group, self._counter = group, counter
        chain = self._chain.build()
        self._stages = chain[group.first : group.last]
        self._is_last = group.last == len(chain)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs one shard, as `Block.to_arrow` makes it, through the group."""
        import ray

        block = Block.from_arrow(table)
        shard, first, run = block.task.index, self._group.first, block.run
        self._set_up(block)
        if first == 0:
            # the shard's time begins when its weights are loaded
            run = replace(run, started=time.time())
        attempt = ray.get(self._counter.begin.remote(shard, first))
        run = replace(run, attempt=max(run.attempt, attempt))
        advance = self._counter.advance.remote if self._is_last else (lambda count: None)
        if attempt > self._settings.ray.deaths:
            names = [stage.name for stage in self._stages]
            stuck_after = self._settings.stuck_after
            with Child(self._chain, names, self._threads, stuck_after) as child:
                records = run_isolated(child, block.records, block.remaining_stages, advance)
        else:
            records = self._run(block, advance)
            run = replace(run, counts=run.counts | take_counts(self._stages))
        self._counter.end.remote(shard, first)
        return replace(block, records=records, run=run).to_arrow()

    def _set_up(self, block: Block) -> None:
        """Loads all weights now if a record needs every stage. Otherwise run_chain loads those that
        it needs.
        """
        every = {stage.name for stage in self._stages}
        if any(every <= names for names in block.remaining_stages):
            for stage in self._stages:
                stage.setup()

    def _run(self, block: Block, advance: Advance) -> list[Record]:
        """Runs the stages in this process, which ends itself when a stage hangs. The timer is
        faulthandler's, since a hanging C library may block every Python thread.
        """
        where = f"{platform.node()}, process {os.getpid()}"

        def entering(stage: str) -> None:
            faulthandler.dump_traceback_later(self._settings.stuck_after, exit=True)
            self._counter.enter.remote(block.task.index, stage, where)

        try:
            return run_chain(
                self._stages,
                block.records,
                block.run.seconds,
                advance,
                block.remaining_stages,
                entering,
            )
        finally:
            faulthandler.cancel_dump_traceback_later()
