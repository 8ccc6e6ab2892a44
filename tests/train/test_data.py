"""The order of samples, and what a micro-batch holds, whoever makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.conditions import build_conditions, training_pixels
from model.spec import SPECS
from tests.train.helpers import Parts, small
from train.data import Order, TrainBatch, micro_batches
from train.shards import ShardSet


class Keys:
    """Micro-batches as lists of keys: the loader's order without its decoding."""

    def __init__(self, shards: ShardSet, seed: int) -> None:
        self._keys, self._order = shards.keys, Order(len(shards), seed)

    def __call__(self, positions: range) -> list[str]:
        return [self._keys[self._order.sample(position)] for position in positions]


def keys(
    shards: ShardSet, count: int, *, world: int, workers: int, size: int, start: int = 0
) -> list[str]:
    """The first `count` keys that `world` processes together consume, in the order of their steps."""
    make = Keys(shards, 5)
    ranks: list[Iterator[list[str]]] = [
        micro_batches(make, start=start, size=size, rank=rank, world=world, workers=workers)
        for rank in range(world)
    ]
    consumed: list[str] = []
    while len(consumed) < count:
        for rank in ranks:
            consumed.extend(next(rank))
    return consumed[:count]


@pytest.mark.parametrize(
    ("world", "workers", "size"), [(1, 2, 2), (1, 3, 4), (2, 0, 2), (2, 2, 1), (8, 0, 1)]
)
def test_the_order_is_that_of_one_process_without_workers(
    shards: ShardSet, world: int, workers: int, size: int
) -> None:
    # 3 shards for up to 8 readers: with shards dealt out to readers, most of them would have none
    # and wait for ever.
    assert keys(shards, 40, world=world, workers=workers, size=size) == keys(
        shards, 40, world=1, workers=0, size=2
    )


def test_it_goes_on_in_mid_epoch_on_another_number_of_processes(shards: ShardSet) -> None:
    whole = keys(shards, 40, world=1, workers=0, size=2)
    assert keys(shards, 27, world=2, workers=1, size=1, start=13) == whole[13:]


def test_an_epoch_has_every_sample_once_and_an_order_of_its_own(shards: ShardSet) -> None:
    seen = keys(shards, 24, world=1, workers=0, size=3)
    epochs = [seen[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == sorted(shards.keys) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_another_seed_is_another_order(shards: ShardSet) -> None:
    one, other = (Order(len(shards), seed) for seed in (1, 2))
    assert [one.sample(i) for i in range(8)] != [other.sample(i) for i in range(8)]


def test_a_batch_is_the_conditions_of_its_records(
    parts: Parts, shards: ShardSet, data: Path, tiny_base: Path
) -> None:
    whole = Parts(small(data, tiny_base, data / "none", loss=_no_drops()), shards)
    batch = whole.make(range(3))
    for row, key in enumerate(batch.keys):
        record = shards.records([shards.keys.index(key)])[0]
        wanted = build_conditions(
            record,
            whole.preparation.tokenizer,
            SPECS["tiny"],
            "corrected",
            resolution=whole.config.resolution,
        )
        for name in (
            "input_ids",
            "token_mask",
            "token_idx",
            "token_valid",
            "region_masks",
            "foreground",
            "identity",
        ):
            torch.testing.assert_close(
                getattr(batch, name)[row], getattr(wanted, name), rtol=0, atol=0
            )
        torch.testing.assert_close(batch.pixels[row], training_pixels(record, 32), rtol=0, atol=0)
        pictures = batch.pictures[
            (batch.picture_rows >= 6 * row) & (batch.picture_rows < 6 * row + 6)
        ]
        shown = torch.cat((wanted.clip_pixels[None], wanted.region_pixels[wanted.token_valid]))
        torch.testing.assert_close(pictures, shown, rtol=0, atol=0)


def test_a_sample_is_the_same_in_any_batch(parts: Parts) -> None:
    together, apart = parts.make(range(8, 12)), [parts.make(range(i, i + 1)) for i in range(8, 12)]
    _same_rows(together, apart)


def test_what_is_drawn_differs_from_position_to_position(parts: Parts) -> None:
    batch = parts.make(range(8))
    assert len({float(noise[0, 0, 0]) for noise in batch.noise}) == 8
    assert not torch.equal(batch.noise, batch.latent_noise)
    assert len(set(batch.timesteps.tolist())) > 4
    again = parts.make(range(8, 16))  # the same eight portraits in the next epoch
    assert not torch.equal(
        again.noise.sum((1, 2, 3)).sort().values, batch.noise.sum((1, 2, 3)).sort().values
    )


def test_drop_rates_are_kept_to(parts: Parts) -> None:
    batches = [parts.make(range(start, start + 20)) for start in range(0, 400, 20)]
    gone = torch.cat([batch.identity for batch in batches]).norm(dim=1) == 0
    empty = torch.cat([batch.token_valid for batch in batches]).sum(1) == 0
    assert 0.15 < gone.float().mean() < 0.25  # identity alone 0.1, both 0.1
    assert 0.24 < empty.float().mean() < 0.36  # no regions where text or identity or both are gone


def test_kept_samples_change_nothing(
    data: Path, tiny_base: Path, shards: ShardSet, tmp_path: Path
) -> None:
    kept, not_kept = (
        Parts(small(data, tiny_base, tmp_path, keep_samples=keep), shards) for keep in (3, 0)
    )
    for start in (0, 4, 8):
        _same_rows(kept.make(range(start, start + 4)), [not_kept.make(range(start, start + 4))])


def test_workers_make_the_same_batches(parts: Parts) -> None:
    here, there = (
        list(islice(micro_batches(parts.make, start=4, size=2, workers=workers), 3))
        for workers in (0, 2)
    )
    for one, other in zip(here, there, strict=True):
        _same_rows(one, [other])


def _same_rows(whole: TrainBatch, parts: list[TrainBatch]) -> None:
    for field in fields(TrainBatch):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "picture_rows":
            continue  # numbered within its own batch
        if isinstance(values[0], Tensor):
            torch.testing.assert_close(
                getattr(whole, field.name), torch.cat(values), rtol=0, atol=0
            )
    assert whole.keys == tuple(key for part in parts for key in part.keys)


def _no_drops() -> object:
    from configs.schema import LossConfig

    return LossConfig(drop_text=0, drop_identity=0, drop_both=0)
