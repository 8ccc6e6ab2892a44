"""Random numbers that depend only on the run's seed, a name and a position.

So the noise of a sample is the same on any number of processes, in any worker and after a resume.
The names are part of the seeds: renaming one changes the numbers of all runs.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_ROUNDS: Final = 6  # of Permutation: an even number
_64_BITS: Final = (1 << 64) - 1


def _hashed_seed(seed: int, name: str, position: int) -> int:
    """Hashes the arguments to an integer of 63 bits, the most that torch accepts."""
    digest = hashlib.blake2b(f"{seed}/{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, name: str, position: int) -> torch.Generator:
    """Returns a CPU generator for the random numbers `name` at `position`."""
    return torch.Generator().manual_seed(_hashed_seed(seed, name, position))


def normal(shape: tuple[int, ...], seed: int, name: str, position: int) -> Tensor:
    """Draws standard normal numbers, float32."""
    return torch.randn(shape, generator=generator(seed, name, position))


def uniform(seed: int, name: str, position: int) -> float:
    """Draws a number in [0, 1)."""
    # 53 bits, the precision of a float, so that rounding never gives 1
    return (_hashed_seed(seed, name, position) >> 10) / 2**53


def integer(limit: int, seed: int, name: str, position: int) -> int:
    """Draws an integer in [0, limit)."""
    return int(torch.randint(limit, (), generator=generator(seed, name, position)))


class Permutation:
    """The numbers 0 to size - 1 in random order; its memory doesn't depend on the size.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of as many bits as `size` has. A
    result that is too large is permuted again, until it isn't (Black and Rogaway 2002).
    """

    def __init__(self, size: int, seed: int, name: str, position: int) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = bits - bits // 2
        self._masks = ((1 << bits // 2) - 1, (1 << self._low_bits) - 1)
        first = _hashed_seed(seed, name, position)
        self._keys = [_mixed(first + round_number) for round_number in range(_ROUNDS)]

    def __getitem__(self, place: int) -> int:
        """Returns the number at a place, 0 to size - 1."""
        number = self._permuted(place)
        while number >= self.size:
            number = self._permuted(number)
        return number

    def place(self, number: int) -> int:
        """Returns the place at which a number, 0 to size - 1, is."""
        place = self._unpermuted(number)
        while place >= self.size:
            place = self._unpermuted(place)
        return place

    def _permuted(self, number: int) -> int:
        left, right = number >> self._low_bits, number & self._masks[1]
        for index, key in enumerate(self._keys):
            # the halves swap, and so do their sizes
            left, right = right, left ^ (_mixed(right ^ key) & self._masks[index % 2])
        return left << self._low_bits | right

    def _unpermuted(self, number: int) -> int:
        left, right = number >> self._low_bits, number & self._masks[1]
        for index in reversed(range(_ROUNDS)):
            mask = self._masks[index % 2]
            left, right = right ^ (_mixed(left ^ self._keys[index]) & mask), left
        return left << self._low_bits | right


def _mixed(value: int) -> int:
    """Returns 64 bits that all depend on all bits of the value (splitmix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _64_BITS
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _64_BITS
    return value ^ value >> 31
