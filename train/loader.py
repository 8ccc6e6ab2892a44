"""The loader: an endless stream of micro-batches, whose order depends only on seed and position.

It is a webdataset pipeline in a torch DataLoader. Usually such a loader splits the list of shards
over processes and workers; this one splits the sequence of micro-batches. Micro-batch m goes to
process m mod W, and there to the workers in turn, which is the order in which the DataLoader reads
from them. So one shard is enough for any number of processes, no process runs out of shards before
the others, and 1, 2 or 8 processes see the same samples at the same step.

The loader must not be passed to `accelerator.prepare`, which would split it a second time
(accelerate #3547).
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from multiprocessing import current_process
from multiprocessing.util import get_temp_dir
from typing import Any, Final, TypeVar

import torch

from configs.errors import PipelineError

Batch = TypeVar("Batch")
Fetched = TypeVar("Fetched")

_GRACE: Final = 1.0  # seconds in which workers may end by themselves
_PARENT_POLL: Final = 0.5  # seconds between two looks of a worker at its parent
# Settings of glibc's mallopt: from how many free bytes on memory is given back to the system, and
# from which size on a block is requested from the system by itself.
_TRIM_THRESHOLD: Final = (-1, 1 << 30)
_MMAP_THRESHOLD: Final = (-3, 1 << 25)  # the largest possible


def _unchanged(_positions: range, fetched: Batch) -> Batch:
    return fetched


def micro_batches(
    fetch: Callable[[range], Fetched],
    make: Callable[[range, Fetched], Batch] = _unchanged,  # type: ignore[assignment]
    *,
    start: int,
    size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    ahead: int = 0,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Yields the micro-batches of one process, without end. Closing the generator ends its workers.

    fetch, make: positions → what it takes to make a micro-batch, and from both the micro-batch; in
    practice a BatchMaker's. They run in the worker processes. ahead: micro-batches that each
    worker fetches, in threads, while it makes one. start: position of the first sample, counted
    over all processes. size: samples in a micro-batch. rank, world: number of this process, and of
    all. workers: loader processes; 0 loads in this one. pin: copy the tensors into pinned memory.
    Raises what `fetch` and `make` raise; a PipelineError without the traceback that torch would add
    to its message.
    """
    import webdataset as wds

    def plan() -> Iterator[range]:
        return (range(first, first + size) for first in count(start, size))

    def of_this_process(source: Iterator[range]) -> Iterator[range]:
        return islice(source, rank, None, world)

    def batches(source: Iterator[range]) -> Iterator[Batch | PipelineError]:
        try:
            for positions, fetched in fetched_ahead(fetch, source, ahead):
                yield make(positions, fetched)
        except PipelineError as error:
            yield error

    pipeline = wds.DataPipeline(plan, of_this_process, wds.split_by_worker, batches)
    closed = mmap.mmap(-1, 1)  # shared with the workers
    loader: Any = torch.utils.data.DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=partial(_start_worker, os.getpid(), closed),
        multiprocessing_context="fork" if workers else None,
    )
    return _loaded(loader, closed)


def fetched_ahead(
    fetch: Callable[[range], Fetched], source: Iterator[range], ahead: int
) -> Iterator[tuple[range, Fetched]]:
    """Yields (item, fetch(item)) in the order of `source`. Up to `ahead` further items are fetched
    meanwhile, each in a thread. An error of `fetch` is raised in its item's turn.
    """
    if not ahead:
        yield from ((item, fetch(item)) for item in source)
        return
    pool = ThreadPoolExecutor(ahead, "read-ahead")
    try:
        waiting = deque((item, pool.submit(fetch, item)) for item in islice(source, ahead))
        while waiting:
            item, future = waiting.popleft()
            fetched = future.result()
            waiting.extend(
                (next_item, pool.submit(fetch, next_item)) for next_item in islice(source, 1)
            )
            yield item, fetched
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _loaded(loader: Any, closed: mmap.mmap) -> Generator[Any, None, None]:
    """Yields the batches of a DataLoader; raises a PipelineError in the place of one. Its workers
    end with the generator, or when Python exits: Python would send them SIGTERM, which they ignore,
    and wait for them.
    """
    batches = iter(loader)

    def end_workers() -> None:
        closed[0] = 1
        if loader.num_workers:
            batches._shutdown_workers()

    atexit.register(end_workers)
    try:
        for batch in batches:
            if isinstance(batch, PipelineError):
                raise batch
            yield batch
    finally:
        end_workers()
        atexit.unregister(end_workers)


def _start_worker(parent: int, closed: mmap.mmap, _worker: int) -> None:
    """Ignores SIGINT and SIGTERM in a worker, and lets it end with the process `parent`, or when
    the byte of `closed` is set, even if it waits for a slow store.

    Ctrl-C sends the first to every process of the terminal, and schedulers send the second to every
    process of a job; the trainer handles them and ends its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Every batch needs the same memory again. New memory costs time, since the system clears it.
    for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(*setting)
    # The folder for sockets: a new one. An inherited one is used by other processes too, and
    # `_end_with` removes it.
    current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    threading.Thread(target=_end_with, args=(parent, closed), daemon=True, name="parent").start()


def _end_with(parent: int, closed: mmap.mmap) -> None:
    while os.getppid() == parent and not closed[0]:
        time.sleep(_PARENT_POLL)
    if closed[0]:
        time.sleep(_GRACE)
    shutil.rmtree(get_temp_dir(), ignore_errors=True)  # has a socket of this worker
    os._exit(0)  # any other status would be an error for torch
