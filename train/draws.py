"""Random numbers with names: each is a function of the run's seed, its own name and a position, and
of nothing else.

So the noise of a sample is the same on any number of processes, in any worker, and after any
resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def _number(seed: int, name: str, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def generator(seed: int, name: str, position: int) -> torch.Generator:
    """A CPU generator for the random numbers called `name` at `position`."""
    return torch.Generator().manual_seed(_number(seed, name, position))


def normal(shape: tuple[int, ...], seed: int, name: str, position: int) -> Tensor:
    """Unit normal float32 numbers."""
    return torch.randn(shape, generator=generator(seed, name, position))


def uniform(seed: int, name: str, position: int) -> float:
    """One number in [0, 1)."""
    # as many bits as a float holds, so never 1
    return (_number(seed, name, position) >> 10) / 2**53


def whole(limit: int, seed: int, name: str, position: int) -> int:
    """One whole number in [0, limit)."""
    return int(torch.randint(limit, (), generator=generator(seed, name, position)))


def permutation(size: int, seed: int, name: str, position: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to size - 1 in another order."""
    return np.random.Generator(np.random.PCG64(_number(seed, name, position))).permutation(size)
