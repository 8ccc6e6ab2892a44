"""Pairs: a sample is reconstructed from another photograph of the same person."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from train import draws
from train.order import Order


class Pairs:
    """Which sample gives the conditions at each position: its reference.

    others: number → the numbers of the other samples of the same person, always in the same order.
    probability: that a position's reference is one of them, all with equal chances. Otherwise, and
    where there is no other, a sample is its own reference.
    """

    def __init__(
        self, order: Order, others: Callable[[int], Sequence[int]], probability: float
    ) -> None:
        self._order, self._others, self._probability = order, others, probability

    def reference(self, position: int) -> int:
        """Returns the number of the reference at `position`."""
        return self._reference(self._order.sample(position), position)

    def positions(self, number: int, end: int) -> Iterator[int]:
        """Yields the positions below `end` at which a sample is the reference of another one."""
        for other in self._others(number) if self._probability else ():
            for position in self._order.positions(other, end):
                if self._reference(other, position) == number:
                    yield position

    def _reference(self, number: int, position: int) -> int:
        seed = self._order.seed
        if draws.uniform(seed, "pair", position) >= self._probability:
            return number
        others = self._others(number)
        if not others:
            return number
        return others[int(len(others) * draws.uniform(seed, "reference", position))]
