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

import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from multiprocessing.util import get_temp_dir
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from configs.errors import PipelineError, ShardError
from model.conditions import (
    SECOND_PAD,
    Conditions,
    DropRates,
    build_conditions,
    collate,
    drop_conditions,
    empty_ids,
    training_pixels,
)
from model.spec import TOKEN_LIMIT, ModelSpec
from stages.record import IDENTITY_DIM, Record
from stages.regions import MAX_REGIONS, Mode
from train import draws
from train.mixture import Mixture
from train.order import SampleOrder
from train.packing import (
    BadSample,
    PackedBatch,
    packed,
    unpacked_clip_images,
    unpacked_masks,
    unpacked_pixels,
)

Batch = TypeVar("Batch")
Fetched = TypeVar("Fetched")
Records = dict[int, Record | ShardError]  # by the samples' numbers

_PARENT_POLL = 0.5  # seconds between two looks at a worker's parent
_UNIT_NORM = 1e-3  # largest deviation; embeddings are stored in float32 and normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """A micro-batch of B samples on the device, with all random numbers that a step needs except
    the loss mask.

    keys: of the samples. references: keys of the samples that give their conditions, their own
    except in pairs.

    valid: (B,) bool, False for a blank sample in the place of one that can't be read.
    pixels: (B, 3, R, R) in [-1, 1], the images to learn.
    clip_images: (n, 3, S, S), the CLIP-normalised images that are not zero; image_rows: (n,)
    int64, their rows among 6·B, which are for each sample the photograph and its five regions.
    latent_noise: (B, 4, h, w), for sampling the VAE's posterior; noise: (B, 4, h, w), the noise to
    predict. timesteps: (B,) int64. The other fields are those of `model.conditions.ConditionBatch`.
    """

    position: int
    keys: tuple[str, ...]
    references: tuple[str, ...]
    valid: Tensor
    pixels: Tensor
    clip_images: Tensor
    image_rows: Tensor
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    region_masks: Tensor
    foreground: Tensor
    identity: Tensor
    latent_noise: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What turns records into micro-batches.

    resolution: side of the training images, in pixels. latent_shape: (4, h, w). timesteps: number
    of the noise schedule's. cache_size: number of prepared samples and pairs, the first ones read,
    that stay in memory, for small data sets with many epochs. verify: compare samples with their
    digests.
    """

    tokenizer: Any
    spec: ModelSpec
    mode: Mode
    resolution: int
    latent_shape: tuple[int, int, int]
    timesteps: int
    drop: DropRates
    seed: int
    tokenizer_2: Any = None
    cache_size: int = 0
    verify: bool = True


# The numbers of a sample and of its reference, which are the same except in pairs.
Pair = tuple[int, int]
# A sample as it is cached: its conditions, its image (3, R, R), and why it is bad.
Prepared = tuple[Conditions, Tensor, BadSample | None]


class BatchMaker:
    """Makes the micro-batch of a range of positions. Runs in the loader's worker processes."""

    def __init__(self, mixture: Mixture, order: SampleOrder, preparation: Preparation) -> None:
        self._mixture, self._order, self._preparation = mixture, order, preparation
        self._references = mixture.pairs(order)
        self._cache: dict[Pair, Prepared] = {}

    def fetch(self, positions: range) -> Records:
        """Reads the samples of these positions that aren't in the cache. Threads may call it while
        `make` prepares others. Raises PipelineError for a fault that isn't a sample's.
        """
        missing = [pair for pair in self._pairs(positions) if pair not in self._cache]
        numbers = [*dict.fromkeys(number for pair in missing for number in pair)]
        records = self._mixture.records(numbers, verify=self._preparation.verify)
        return dict(zip(numbers, records, strict=True))

    def make(self, positions: range, records: Records) -> PackedBatch:
        """Makes the micro-batch from what `fetch` returned for it."""
        pairs = self._pairs(positions)
        samples = self._samples(pairs, records)
        prep, seed = self._preparation, self._preparation.seed
        conditions = drop_conditions(
            collate([sample for sample, _, _ in samples]),
            torch.tensor(
                [draws.uniform(seed, "drop", position) for position in positions],
                dtype=torch.float64,
            ),
            prep.drop,
            prep.tokenizer,
        )
        return packed(
            conditions,
            torch.stack([pixels for _, pixels, _ in samples]),
            [bad for _, _, bad in samples],
            references=tuple(self._mixture.key(reference) for _, reference in pairs),
            position=positions.start,
        )

    def __call__(self, positions: range) -> PackedBatch:
        return self.make(positions, self.fetch(positions))

    def _pairs(self, positions: range) -> list[Pair]:
        return [(self._order.sample(p), self._references.reference(p)) for p in positions]

    def _samples(self, pairs: list[Pair], records: Records) -> list[Prepared]:
        """Returns the prepared samples, from the cache or from their records."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._cache]
        prepared = {pair: self._prepare(pair, records) for pair in missing}
        for pair in missing[: max(0, self._preparation.cache_size - len(self._cache))]:
            self._cache[pair] = prepared[pair]
        return [prepared[pair] if pair in prepared else self._cache[pair] for pair in pairs]

    def _prepare(self, pair: Pair, records: Records) -> Prepared:
        number, reference = pair
        try:
            shown = None if reference == number else _usable(records[reference])
            conditions, pixels = self._build(_usable(records[number]), shown)
        except (ShardError, ValueError, OSError) as error:  # Pillow's errors are OSErrors
            if reference != number:
                alone = self._prepare((number, number), records)
                if alone[2] is not None:
                    return alone
            return self._blank(number, bad=reference, reason=str(error))
        return conditions, pixels, None

    def _blank(self, number: int, *, bad: int, reason: str) -> Prepared:
        prep, mixture = self._preparation, self._mixture
        conditions = blank_conditions(
            prep.tokenizer, prep.spec, key=mixture.key(number), resolution=prep.resolution
        )
        pixels = torch.zeros(3, prep.resolution, prep.resolution)
        return conditions, pixels, BadSample(mixture.key(bad), mixture.shard_of(bad), reason)

    def _build(self, record: Record, reference: Record | None) -> tuple[Conditions, Tensor]:
        prep = self._preparation
        conditions = build_conditions(
            record,
            prep.tokenizer,
            prep.spec,
            prep.mode,
            resolution=prep.resolution,
            tokenizer_2=prep.tokenizer_2,
            reference=reference,
        )
        return conditions, training_pixels(record, prep.resolution)


def _usable(record: Record | ShardError) -> Record:
    """Returns the record. Raises the error in its place, or ValueError for an identity that is not
    a finite vector of unit norm.
    """
    if isinstance(record, ShardError):
        raise record
    if record.identity is not None:
        norm = float(np.linalg.norm(record.identity.astype(np.float64)))
        if not abs(norm - 1) <= _UNIT_NORM:  # also if it is NaN
            raise ValueError(f"the identity embedding has norm {norm:g}, expected 1")
    return record


def blank_conditions(tokenizer: Any, spec: ModelSpec, *, key: str, resolution: int) -> Conditions:
    """Returns the conditions of a sample without text, regions and identity: all its tensors are
    zero, except for the token ids. It takes the place of one that can't be read.
    """
    pixels = torch.zeros(3, spec.vision_size, spec.vision_size)
    masks = torch.zeros(resolution, resolution)
    return Conditions(
        key=key,
        text="",
        regions=(),
        dropped=(),
        input_ids=empty_ids(tokenizer),
        input_ids_2=empty_ids(tokenizer, pad_id=SECOND_PAD),
        token_mask=torch.zeros(TOKEN_LIMIT, dtype=torch.bool),
        token_idx=torch.zeros(MAX_REGIONS, dtype=torch.int64),
        token_valid=torch.zeros(MAX_REGIONS, dtype=torch.bool),
        region_pixels=pixels.expand(MAX_REGIONS, -1, -1, -1),
        region_masks=masks.expand(MAX_REGIONS, -1, -1),
        foreground=masks,
        clip_pixels=pixels,
        identity=torch.zeros(IDENTITY_DIM),
    )


def unpacked(
    batch: PackedBatch, preparation: Preparation, device: torch.device | str
) -> TrainBatch:
    """Returns a packed micro-batch on the device, with its random numbers."""
    positions = range(batch.position, batch.position + len(batch.keys))
    shape, seed = preparation.latent_shape, preparation.seed
    normal = {
        name: torch.stack([draws.normal(shape, seed, name, position) for position in positions])
        for name in ("latent_noise", "noise")
    }
    timesteps = [
        draws.integer(preparation.timesteps, seed, "timestep", position) for position in positions
    ]
    moved = batch.to(device)
    region_masks, foreground = unpacked_masks(moved)
    return TrainBatch(
        position=batch.position,
        keys=batch.keys,
        references=batch.references,
        valid=moved.valid,
        pixels=unpacked_pixels(moved),
        clip_images=unpacked_clip_images(moved),
        image_rows=moved.image_rows,
        input_ids=moved.input_ids,
        input_ids_2=moved.input_ids_2,
        token_mask=moved.token_mask,
        token_idx=moved.token_idx,
        token_valid=moved.token_valid,
        region_masks=region_masks,
        foreground=foreground,
        identity=moved.identity,
        timesteps=torch.tensor(timesteps, dtype=torch.int64).to(device),
        **{name: value.to(device) for name, value in normal.items()},
    )


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
) -> Iterator[Batch]:
    """Yields the micro-batches of one process, without end.

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
    loader: Any = torch.utils.data.DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=partial(_start_worker, os.getpid()),
        multiprocessing_context="fork" if workers else None,
    )
    return _raising(iter(loader))


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


def _raising(batches: Iterator[Batch | PipelineError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, PipelineError):
            raise batch
        yield batch


def _start_worker(parent: int, _worker: int) -> None:
    """Ignores SIGINT and SIGTERM in a worker, and lets it end with the process `parent`.

    Ctrl-C sends the first to every process of the terminal, and schedulers send the second to every
    process of a job; the trainer handles them and ends its workers. Torch's workers too end after
    their parent was killed, but not before their requests have been answered.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="parent").start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL)
    shutil.rmtree(get_temp_dir(), ignore_errors=True)  # has a socket of this worker
    os._exit(1)
