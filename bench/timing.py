"""Times of a function, on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_WARMUP, _TURNS = 2, 5


def median_seconds(function: Callable[[], object], device: str) -> float:
    """Returns the median of five calls after two that aren't counted, until the device is done."""
    seconds = []
    for _ in range(_WARMUP + _TURNS):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARMUP:])
