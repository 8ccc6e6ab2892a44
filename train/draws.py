"""Random numbers that depend only on the run's seed, a name and a position.

So the noise of a sample is the same on any number of processes, in any worker and after a resume.
The names are part of the seeds: renaming one changes the numbers of all runs.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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


def permutation(size: int, seed: int, name: str, position: int) -> npt.NDArray[np.int64]:
    """Returns the numbers 0 to size - 1 in random order."""
    bits = np.random.PCG64(_hashed_seed(seed, name, position))
    return np.random.Generator(bits).permutation(size)
