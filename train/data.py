"""The loader: an endless stream of micro-batches whose order depends on the seed and the position
alone.

webdataset's pipeline carries it. What is split by node and by worker is not the list of shards but
the plan of micro-batches: number m goes to process m mod W and there to workers in turn, which is
the order in which torch's DataLoader asks them. So one shard is enough for any number of processes,
nobody waits for a neighbour whose shards ran out, and 1, 2 or 8 processes see the same samples at
the same step. The loader must not be passed to `accelerator.prepare`: it would split again what is
split already (accelerate #3547).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.conditions import (
    ConditionBatch,
    Conditions,
    DropRates,
    build_conditions,
    collate,
    drop_conditions,
    training_pixels,
)
from model.spec import ModelSpec
from stages.record import Record
from stages.regions import Mode
from train import draws
from train.shards import ShardSet

Batch = TypeVar("Batch")


class Order:
    """Which sample stands at a position: epoch after epoch, each in an order of its own."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def sample(self, position: int) -> int:
        """The number of the sample at `position`, counted from the beginning of training."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = draws.permutation(self.size, self.seed, "order", epoch)
        return int(self._permutation[place])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What one micro-batch of B samples sends to the device; nothing else is random in a step.

    position: of its first sample. pixels: (B, 3, R, R) in [-1, 1]. pictures: (n, 3, S, S), the
    CLIP-normalised pictures that are not zero, and picture_rows: (n,) int64, which of the 6·B rows
    they are: of every sample the photograph, then its five regions. latent_noise, noise: (B, 4, h,
    w), for the VAE's sample and to be predicted. timesteps: (B,) int64. The rest as in
    model.conditions.
    """

    position: int
    keys: tuple[str, ...]
    pixels: Tensor
    pictures: Tensor
    picture_rows: Tensor
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

    def to(self, device: torch.device | str) -> TrainBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> TrainBatch:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> TrainBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {
            name: change(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How records become micro-batches. latent_shape: (4, h, w). timesteps: how many the noise
    schedule has.

    keep: prepared samples kept in memory, the first that come; for sets that are seen many times
    over.
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
    keep: int = 0


class BatchMaker:
    """Positions → TrainBatch. Lives in a worker process."""

    def __init__(self, shards: ShardSet, order: Order, preparation: Preparation) -> None:
        self._shards, self._order, self._how = shards, order, preparation
        self._kept: dict[int, tuple[Conditions, Tensor]] = {}

    def __call__(self, positions: range) -> TrainBatch:
        numbers = [self._order.sample(position) for position in positions]
        samples = self._samples(numbers)
        how = self._how
        conditions = drop_conditions(
            collate([sample for sample, _ in samples]),
            torch.tensor(
                [draws.uniform(how.seed, "drop", position) for position in positions],
                dtype=torch.float64,
            ),
            how.drop,
            how.tokenizer,
        )
        pictures, rows = _non_zero_pictures(conditions)
        normal = {
            name: torch.stack(
                [draws.normal(how.latent_shape, how.seed, name, position) for position in positions]
            )
            for name in ("latent_noise", "noise")
        }
        steps = [
            draws.whole(how.timesteps, how.seed, "timestep", position) for position in positions
        ]
        return TrainBatch(
            position=positions.start,
            keys=conditions.keys,
            pixels=torch.stack([pixels for _, pixels in samples]),
            pictures=pictures,
            picture_rows=rows,
            input_ids=conditions.input_ids,
            input_ids_2=conditions.input_ids_2,
            token_mask=conditions.token_mask,
            token_idx=conditions.token_idx,
            token_valid=conditions.token_valid,
            region_masks=conditions.region_masks,
            foreground=conditions.foreground,
            identity=conditions.identity,
            timesteps=torch.tensor(steps, dtype=torch.int64),
            **normal,
        )

    def _samples(self, numbers: list[int]) -> list[tuple[Conditions, Tensor]]:
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        prepared = dict(self._kept) if not missing else {**self._kept, **self._prepare(missing)}
        for number in missing[: max(0, self._how.keep - len(self._kept))]:
            self._kept[number] = prepared[number]
        return [prepared[number] for number in numbers]

    def _prepare(self, numbers: list[int]) -> dict[int, tuple[Conditions, Tensor]]:
        records = self._shards.records(numbers)
        return {
            number: self._prepare_one(record)
            for number, record in zip(numbers, records, strict=True)
        }

    def _prepare_one(self, record: Record) -> tuple[Conditions, Tensor]:
        how = self._how
        conditions = build_conditions(
            record,
            how.tokenizer,
            how.spec,
            how.mode,
            resolution=how.resolution,
            tokenizer_2=how.tokenizer_2,
        )
        return conditions, training_pixels(record, how.resolution)


def _non_zero_pictures(conditions: ConditionBatch) -> tuple[Tensor, Tensor]:
    """The pictures the image tower must see, and their rows. Told here, where counting them costs
    no device a wait.
    """
    every = torch.cat((conditions.clip_pixels[:, None], conditions.region_pixels), dim=1).flatten(
        0, 1
    )
    rows = every.flatten(1).any(dim=1).nonzero().flatten()
    return every[rows], rows


def micro_batches(
    make: Callable[[range], Batch],
    *,
    start: int,
    size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Process `rank` of `world`'s micro-batches of `size` samples, from position `start` on,
    without end.

    make: positions → micro-batch, in practice a BatchMaker; runs in the worker processes.
    """
    import webdataset as wds

    def plan() -> Iterator[range]:
        return (range(first, first + size) for first in count(start, size))

    def of_this_process(source: Iterator[range]) -> Iterator[range]:
        return islice(source, rank, None, world)

    def made(source: Iterator[range]) -> Iterator[Batch]:
        return map(make, source)

    pipeline = wds.DataPipeline(plan, of_this_process, wds.split_by_worker, made)
    loader: Any = torch.utils.data.DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupt,
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


def _ignore_interrupt(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the trainer answers it, and ends its
    workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
