"""The order of training: which sample is at which position, and which positions a sample has.

A position counts samples over all processes, from the start of training. Both directions are
calculated, without a list, for any number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, Protocol

import numpy as np

from configs.errors import ConfigError
from train import draws

BLOCK: Final = 10_000  # positions in which each data set has exactly its share


class Order(Protocol):
    """Which sample is at which position of a run."""

    @property
    def seed(self) -> int: ...

    def sample(self, position: int) -> int:
        """Returns the number of the sample at `position`."""
        ...

    def positions(self, number: int, end: int) -> Iterator[int]:
        """Yields the positions of a sample that are below `end`."""
        ...

    def step_start(self, position: int) -> int:
        """Returns the first position from `position` on at which a step may begin."""
        ...


class SampleOrder:
    """Maps positions to sample numbers and back.

    sizes: number of samples of each data set. Samples are numbered through all data sets, in the
    given order. weights: share of positions of each data set, in any unit; None: their sizes. Of
    each 10,000 positions, every data set has a fixed number, in random order. Each data set is read
    in shuffled epochs: every sample once, then all again in another order. slots: how many of
    10,000 positions each data set has. name: another name gives another order. Raises ConfigError
    for a weight that isn't positive, or is so small that a data set gets no position.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        weights: Sequence[float] | None = None,
        name: str = "",
    ) -> None:
        self.sizes, self.seed, self._name = tuple(sizes), seed, name
        self._first = [0, *accumulate(self.sizes)]  # number of each data set's first sample
        self.slots = _slots([*map(float, sizes)] if weights is None else weights)
        self._first_slot = [0, *accumulate(self.slots)]
        self._cached: dict[str, tuple[int, draws.Permutation]] = {}

    def __len__(self) -> int:
        """Returns the number of samples."""
        return self._first[-1]

    def sample(self, position: int) -> int:
        """Returns the number of the sample at `position`."""
        block, place = divmod(position, self._first_slot[-1])
        slot = self._mixed(block)[place] if len(self.sizes) > 1 else place
        index = int(np.searchsorted(self._first_slot, slot, side="right")) - 1
        turn = block * self.slots[index] + slot - self._first_slot[index]
        epoch, place = divmod(turn, self.sizes[index])
        return self._first[index] + self._shuffled(index, epoch)[place]

    def positions(self, number: int, end: int) -> Iterator[int]:
        """Yields the positions of a sample that are below `end`, one for each epoch of its data
        set. They may leave the order by up to 10,000 if there are several data sets.
        """
        index = int(np.searchsorted(self._first, number, side="right")) - 1
        size, slots = self.sizes[index], self.slots[index]
        blocks = -(-end // self._first_slot[-1])
        for epoch in range(-(-blocks * slots // size)):
            turn = epoch * size + self._shuffled(index, epoch).place(number - self._first[index])
            block, rest = divmod(turn, slots)
            slot = self._first_slot[index] + rest
            place = self._mixed(block).place(slot) if len(self.sizes) > 1 else slot
            position = block * self._first_slot[-1] + place
            if position < end:
                yield position

    def step_start(self, position: int) -> int:
        """Returns `position`: a step may begin anywhere."""
        return position

    def _shuffled(self, index: int, epoch: int) -> draws.Permutation:
        return self._permutation(self.sizes[index], f"order-{index}", epoch)

    def _mixed(self, block: int) -> draws.Permutation:
        return self._permutation(self._first_slot[-1], "mixture", block)

    def _permutation(self, size: int, name: str, number: int) -> draws.Permutation:
        """Returns the permutation, from the cache if it was the last of this name."""
        last = self._cached.get(name)
        if last is None or last[0] != number:
            permutation = draws.Permutation(size, self.seed, self._name + name, number)
            last = self._cached[name] = (number, permutation)
        return last[1]


def _slots(weights: Sequence[float]) -> list[int]:
    """Returns how many of BLOCK positions each data set has (largest remainders)."""
    if not all(weight > 0 for weight in weights):
        raise ConfigError(f"weights {[*weights]}: expected numbers above 0")
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: slots[i] - exact[i])
    for index in by_remainder[: BLOCK - sum(slots)]:
        slots[index] += 1
    if not all(slots):
        raise ConfigError(
            f"weights {[*weights]}: the smallest is below 1/{BLOCK:,} of their sum, so that data "
            "set would never be read. Raise it, or leave the data set out."
        )
    return slots
