"""Spread: how one measured quantity is distributed, as a histogram on round edges and a few exact figures."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

_BINS = 24  # at most about this many
_DIGITS = 6  # figures are rounded to this many decimals


def spread(values: Sequence[float], *, whole: bool = False) -> dict[str, Any]:
    """count, min, median, mean, max; and `counts` of the values in [edges[i], edges[i + 1]).

    whole: the values are whole numbers, so that no bin is narrower than 1. Sums are exact (fsum): the order of the
    values changes nothing. With no values the figures are None and the histogram is empty.
    """
    if not values:
        return {"count": 0, "min": None, "median": None, "mean": None, "max": None, "edges": [], "counts": []}
    low, high = min(values), max(values)
    edges = _edges(low, high, whole)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[bisect_right(edges, value) - 1] += 1
    return {
        "count": len(values),
        "min": rounded(low),
        "median": rounded(statistics.median(values)),
        "mean": rounded(math.fsum(values) / len(values)),
        "max": rounded(high),
        "edges": edges,
        "counts": counts,
    }


def rounded(value: float) -> float:
    return round(value, _DIGITS)


def _edges(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 × 10ⁿ from at or under `low` to over `high`."""
    step = _round_step((high - low) / _BINS)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    first -= _edge(first, step) > low  # the division may be off by a bit where a value lies on an edge
    last += _edge(last, step) <= high
    return [_edge(index, step) for index in range(first, last + 1)]


def _edge(index: int, step: float) -> float:
    return round(index * step, 9)


def _round_step(least: float) -> float:
    if least <= 1e-9:
        return 0.01
    power: float = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)
