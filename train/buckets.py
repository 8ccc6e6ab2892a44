"""Buckets: training images of several aspect ratios, and steps whose samples have one shape.

Each sample is in the bucket whose aspect ratio is nearest to its image's. All samples of a step are
of one bucket, so all processes and micro-batches of a step have equal shapes. Which bucket a step
has depends only on the samples, the seed and the size of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from model.pixels import Size
from train import draws
from train.order import BLOCK, SampleOrder

_LEAST: Final = 2  # of BLOCK positions of a bucket, for each data set that has samples there


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Returns width and height of the possible buckets, the narrowest first.

    Sides are multiples of `multiple`, from half of `resolution` to its double; each width has the
    largest height with which a bucket has at most as many pixels as the square.
    """
    sizes = {(resolution, resolution)}
    for short in range(-(-resolution // 2 // multiple) * multiple, resolution, multiple):
        long = min(resolution**2 // short, 2 * resolution) // multiple * multiple
        sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: Fraction(*size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """The samples of a run in buckets.

    sizes: width and height of each bucket, the narrowest first. of: (N,) uint16, each sample's
    bucket. batch: samples of a step.
    """

    sizes: tuple[Size, ...]
    of: Any
    batch: int

    def size(self, number: int) -> Size:
        """Returns width and height of a sample's training image."""
        return self.sizes[self.of[number]]

    def __str__(self) -> str:
        counts = np.bincount(self.of, minlength=len(self.sizes)).tolist()
        each = [f"{w}×{h}: {n:,}" for (w, h), n in zip(self.sizes, counts, strict=True)]
        return f"samples in buckets of width × height: {', '.join(each)}"


def in_buckets(pixels: Sequence[tuple[Any, Any]], sizes: Sequence[Size], batch: int) -> Buckets:
    """Returns the samples in the buckets of these sizes with the nearest aspect ratio.

    pixels: widths and heights of the images of each data set. Between two buckets, the boundary is
    the geometric mean of their ratios, which is compared in integers.
    """
    width, height = (np.concatenate(each).astype(np.int64) for each in zip(*pixels, strict=True))
    of = np.zeros(len(width), np.uint16)
    for (w1, h1), (w2, h2) in pairwise(sizes):
        of += width**2 * (h1 * h2) > height**2 * (w1 * w2)
    return Buckets(sizes=tuple(sizes), of=of, batch=batch)


def chosen_buckets(
    pixels: Sequence[tuple[Any, Any]], slots: Sequence[int], sizes: Sequence[Size], batch: int
) -> Buckets:
    """Returns the samples in those buckets that have enough for a step without a sample twice. The
    one that has the fewest is left out, until that holds; its samples are in the nearest of the
    others then.

    pixels: as for `in_buckets`. slots: of each data set, see SampleOrder.
    """
    counts = [len(width) for width, _ in pixels]
    while True:
        buckets = in_buckets(pixels, sizes, batch)
        shares = _Shares.of(buckets, counts, slots)
        few = [i for i in range(len(sizes)) if shares.steps[i] < shares.least[i]]
        if not few or len(sizes) == 1:
            return buckets
        fewest = min(few, key=lambda index: shares.steps[index])
        sizes = [size for index, size in enumerate(sizes) if index != fewest]


class _Shares(NamedTuple):
    """Of each bucket: steps in a pass, in which the run takes as many samples as there are; how
    many steps it must have for a step to have no sample twice; and the numbers of samples of each
    data set, and its share of the bucket's positions.
    """

    steps: list[Fraction]
    least: list[Fraction]
    counts: list[list[int]]
    uses: list[list[Fraction]]

    @staticmethod
    def of(buckets: Buckets, counts: Sequence[int], slots: Sequence[int]) -> _Shares:
        firsts = [0, *accumulate(counts)]
        # how often a sample of each data set is used in a pass
        rates = [
            Fraction(each * firsts[-1], count * sum(slots))
            for each, count in zip(slots, counts, strict=True)
        ]
        own = [
            np.bincount(buckets.of[start:end], minlength=len(buckets.sizes)).tolist()
            for start, end in pairwise(firsts)
        ]
        by_bucket = [[*each] for each in zip(*own, strict=True)]
        uses = [[rate * n for rate, n in zip(rates, each, strict=True)] for each in by_bucket]
        return _Shares(
            steps=[sum(each, Fraction(0)) / buckets.batch for each in uses],
            least=[
                max((rate for rate, n in zip(rates, each, strict=True) if n), default=Fraction(1))
                for each in by_bucket
            ],
            counts=by_bucket,
            uses=uses,
        )


class BucketOrder:
    """Maps positions to sample numbers and back, as SampleOrder does, for samples in buckets.

    The steps are in passes. In a pass, each bucket has as many steps as its samples need: of 100
    samples and steps of 16, 6.25, so 6, and in every fourth pass 7. The steps of a pass are in
    random order. Over its own steps, a bucket is read as a data set is, in shuffled epochs; with
    several data sets, each has at least 2 of 10,000 positions of a bucket where it has samples.
    In memory are four bytes for each sample, and eight for each step of a pass.

    counts: samples of each data set. slots: see SampleOrder.
    """

    def __init__(
        self, buckets: Buckets, counts: Sequence[int], slots: Sequence[int], seed: int
    ) -> None:
        self.seed, self._buckets = seed, buckets
        shares = _Shares.of(buckets, counts, slots)
        self._steps = shares.steps
        self._numbers = [
            np.flatnonzero(buckets.of == i).astype(np.uint32) for i in range(len(buckets.sizes))
        ]
        self._orders = []
        for (width, height), own, uses in zip(
            buckets.sizes, shares.counts, shares.uses, strict=True
        ):
            least = sum(uses) * Fraction(_LEAST, BLOCK)
            weights = [float(max(use, least)) for use in uses if use]
            sizes = [count for count in own if count]
            self._orders.append(SampleOrder(sizes, seed, weights, f"{width}x{height}-"))
        self._last: tuple[int, list[Any]] = (-1, [])

    def sample(self, position: int) -> int:
        """Returns the number of the sample at `position`."""
        step, place = divmod(position, self._buckets.batch)
        bucket, turn = self._turn(step)
        own = self._orders[bucket].sample(turn * self._buckets.batch + place)
        return int(self._numbers[bucket][own])

    def positions(self, number: int, end: int) -> Iterator[int]:
        """Yields the positions of a sample that are below `end`, as SampleOrder does."""
        bucket, batch = int(self._buckets.of[number]), self._buckets.batch
        own = int(np.searchsorted(self._numbers[bucket], number))
        turns = self._begun(bucket, self._pass_of(-(-end // batch)) + 1)
        for position in self._orders[bucket].positions(own, turns * batch):
            turn, place = divmod(position, batch)
            position = self._step(bucket, turn) * batch + place
            if position < end:
                yield position

    def step_start(self, position: int) -> int:
        """Returns the first position from `position` on at which a step begins."""
        return -(-position // self._buckets.batch) * self._buckets.batch

    def _turn(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step, counted from 0, and how many it had before."""
        number = self._pass_of(step)
        place = step - self._first(number)
        for bucket, places in enumerate(self._places(number)):
            index = int(np.searchsorted(places, place))
            if index < len(places) and places[index] == place:
                return bucket, self._begun(bucket, number) + index
        raise AssertionError(f"step {step} has no bucket")

    def _step(self, bucket: int, turn: int) -> int:
        """Returns the step that a bucket has after `turn` others."""
        number = int(turn / self._steps[bucket])
        while self._begun(bucket, number + 1) <= turn:
            number += 1
        place = self._places(number)[bucket][turn - self._begun(bucket, number)]
        return self._first(number) + int(place)

    def _pass_of(self, step: int) -> int:
        number = int(step / sum(self._steps))
        while self._first(number + 1) <= step:
            number += 1
        return number

    def _begun(self, bucket: int, number: int) -> int:
        """Returns how many steps a bucket has before a pass."""
        return int(self._steps[bucket] * number)

    def _first(self, number: int) -> int:
        """Returns the first step of a pass."""
        return sum(self._begun(bucket, number) for bucket in range(len(self._steps)))

    def _places(self, number: int) -> list[Any]:
        """Returns the places of each bucket among the steps of a pass, ascending."""
        last = self._last  # threads replace it
        if last[0] != number:
            counts = [
                self._begun(bucket, number + 1) - self._begun(bucket, number)
                for bucket in range(len(self._steps))
            ]
            random = draws.generator(self.seed, "buckets", number)
            mixed = torch.randperm(sum(counts), generator=random).numpy()
            parts = np.split(mixed, [*accumulate(counts)][:-1])
            last = self._last = (number, [np.sort(part) for part in parts])
        return last[1]
