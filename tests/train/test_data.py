"""The order of samples, and the contents of micro-batches, with any number of processes."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from model.conditions import build_conditions
from model.pixels import training_pixels
from model.spec import SPECS
from stages.record import Record
from tests.train.helpers import Parts, assert_same_rows, small
from train import draws
from train.batch_maker import BatchMaker
from train.data import unpacked
from train.loader import micro_batches
from train.mixture import Mixture
from train.order import SampleOrder
from train.packing import PackedBatch, check_shared_memory
from train.shards import ShardSet


def test_each_epoch_has_every_sample_once_and_in_another_order(mixture: Mixture) -> None:
    order = mixture.order(5)
    epochs = [[order.sample(start + place) for place in range(8)] for start in (0, 8, 16)]
    assert all(sorted(epoch) == [*range(8)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_an_order_is_a_permutation(size: int) -> None:
    for epoch in range(3):
        order = draws.Permutation(size, 5, "order", epoch)
        assert sorted(order[i] for i in range(size)) == list(range(size))


def test_an_order_has_no_pattern() -> None:
    """Of the numbers at neighbouring places, and of a number's places in several epochs."""
    size = 10_000
    orders = [draws.Permutation(size, 5, "order", epoch) for epoch in range(2)]
    one, two = ([order[i] for i in range(size)] for order in orders)
    for first, second in ((one, range(size)), (one, one[1:] + one[:1]), (one, two)):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.04  # four standard deviations
    steps = {second - first for first, second in pairwise(one)}
    assert len(steps) > size / 2


def test_an_order_of_a_billion_samples_takes_no_memory() -> None:
    order = SampleOrder([1_000_000_000], 1)
    numbers = [order.sample(position) for position in range(999_999_990, 1_000_000_010)]
    assert len(set(numbers)) == 20 and max(numbers) < 1_000_000_000
    assert sum(number > 500_000_000 for number in numbers) in range(3, 18)


def test_another_seed_is_another_order(shards: ShardSet) -> None:
    one, other = (SampleOrder([len(shards)], seed) for seed in (1, 2))
    assert [one.sample(i) for i in range(8)] != [other.sample(i) for i in range(8)]


def test_a_batch_has_the_conditions_of_its_records(
    shards: ShardSet, mixture: Mixture, data: Path, tiny_base: Path
) -> None:
    parts = Parts(small(data, tiny_base, data / "none", loss=_no_drops()), mixture)
    batch = parts.make(range(3))
    for row, key in enumerate(batch.keys):
        number = shards.number(key)
        assert number is not None
        record = shards.records([number])[0]
        assert isinstance(record, Record)
        expected = build_conditions(
            record,
            parts.preparation.tokenizer,
            SPECS["tiny"],
            "corrected",
            resolution=parts.config.resolution,
        )
        for name in (
            "input_ids",
            "token_mask",
            "token_idx",
            "token_valid",
            "identity",
        ):
            torch.testing.assert_close(
                getattr(batch, name)[row], getattr(expected, name), rtol=0, atol=0
            )
        for name in ("region_masks", "foreground"):  # packed as bits
            expected_bits = getattr(expected, name) > 0.5
            assert torch.equal(getattr(batch, name)[row], expected_bits.float())
        torch.testing.assert_close(batch.pixels[row], training_pixels(record, 32), rtol=0, atol=0)
        own_rows = (batch.image_rows >= 6 * row) & (batch.image_rows < 6 * row + 6)
        regions = expected.region_pixels[expected.token_valid]
        images = torch.cat((expected.clip_pixels[None], regions))
        torch.testing.assert_close(batch.clip_images[own_rows], images, rtol=0, atol=1e-6)


def test_a_sample_is_the_same_in_any_batch(parts: Parts) -> None:
    together, apart = parts.make(range(8, 12)), [parts.make(range(i, i + 1)) for i in range(8, 12)]
    assert_same_rows(together, *apart)


def test_random_numbers_differ_between_positions(parts: Parts) -> None:
    batch = parts.make(range(8))
    assert len({float(noise[0, 0, 0]) for noise in batch.noise}) == 8
    assert not torch.equal(batch.noise, batch.latent_noise)
    assert len(set(batch.timesteps.tolist())) > 4
    next_epoch = parts.make(range(8, 16))  # the same eight portraits
    assert not torch.equal(
        next_epoch.noise.sum((1, 2, 3)).sort().values, batch.noise.sum((1, 2, 3)).sort().values
    )


def test_conditions_are_dropped_at_the_configured_rates(parts: Parts) -> None:
    batches = [parts.make(range(start, start + 20)) for start in range(0, 400, 20)]
    no_identity = torch.cat([batch.identity for batch in batches]).norm(dim=1) == 0
    no_regions = torch.cat([batch.token_valid for batch in batches]).sum(1) == 0
    assert 0.15 < no_identity.float().mean() < 0.25  # identity alone 0.1, both 0.1
    assert 0.24 < no_regions.float().mean() < 0.36  # text 0.1, identity 0.1, both 0.1


def test_cached_samples_equal_samples_read_again(
    data: Path, tiny_base: Path, mixture: Mixture, tmp_path: Path
) -> None:
    with_cache, without = (
        Parts(small(data, tiny_base, tmp_path, keep_samples=size), mixture) for size in (3, 0)
    )
    for start in (0, 4, 8):
        positions = range(start, start + 4)
        assert_same_rows(with_cache.make(positions), without.make(positions))


def test_workers_make_the_same_batches(parts: Parts) -> None:
    by_main, by_workers = (
        list(islice(micro_batches(parts.maker, start=4, size=2, workers=workers), 3))
        for workers in (0, 2)
    )
    for one, other in zip(by_main, by_workers, strict=True):
        assert_same_rows(*(unpacked(each, parts.preparation, "cpu") for each in (one, other)))


def _no_drops() -> object:
    from configs.training import LossConfig

    return LossConfig(drop_text=0, drop_identity=0, drop_both=0)


def test_a_packed_sample_has_less_than_two_megabytes_at_512_pixels(
    mixture: Mixture, data: Path, tiny_base: Path
) -> None:
    parts = Parts(small(data, tiny_base, data / "none", resolution=512), mixture)
    parts.preparation = replace(parts.preparation, spec=SPECS["sd15"], resolution=512)
    maker = BatchMaker(mixture, mixture.order(3), parts.preparation)
    batch = maker(range(4))
    tensors = [getattr(batch, field.name) for field in fields(PackedBatch)]
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    assert size / 4 < 2_000_000
    # at its own resolution, a mask is the label map's, so that nothing is lost by packing
    assert set(unpacked(batch, parts.preparation, "cpu").region_masks.unique().tolist()) == {0, 1}


def test_too_little_shared_memory_is_an_error_that_names_the_settings() -> None:
    check_shared_memory(size=2, workers=2, resolution=64, side=64)
    sizes = {"size": 1_000_000, "resolution": 512, "side": 224}
    message = (
        r"num_workers=4 and micro_batch_size=1000000 need 15,\d+,\d+ MB .* MB free\. .*shm-size"
    )
    with pytest.raises(ConfigError, match=message):
        check_shared_memory(workers=4, **sizes)
    check_shared_memory(workers=0, **sizes)
