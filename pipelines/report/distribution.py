"""Spread: how one measured quantity is distributed, as a histogram on round edges and a few exact
figures.

Sums are exact: every value is split into whole numbers by its exponent, and whole numbers add
without error. So the order of the values changes nothing, and sums of shards merge into the sum of
the set.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS = 24  # at most about this many
_DIGITS = 6  # figures are rounded to this many decimals
_LOWEST: Final = -1080  # below any double's exponent
_EXPONENTS: Final = 2120
_HIGH: Final = 27  # a double's 53 bits are 27 high and 26 low ones: sums of 2²⁶ of either are exact
_LOW: Final = 53


class Sums:
    """Exact sums of the rows of matrices (F, N); NaN is no value."""

    def __init__(self, rows: int) -> None:
        self._parts = np.zeros((2, rows, _EXPONENTS))

    def add(self, values: Floats) -> list[float]:
        """Takes the values in; returns the sum of each of these rows alone, rounded once."""
        rows, present = len(values), ~np.isnan(values)
        if not present.any():
            return [0.0] * rows
        row = np.nonzero(present)[0]
        fraction, exponent = np.frexp(values[present])
        first = int(exponent.min())
        width = int(exponent.max()) - first + 1
        high = np.floor(fraction * 2.0**_HIGH)
        low = fraction * 2.0**_LOW - high * 2.0 ** (_LOW - _HIGH)
        where = row * width + (exponent - first)
        parts: Floats = np.stack(
            [np.bincount(where, part, rows * width).reshape(rows, width) for part in (high, low)]
        )
        self._parts[:, :, first - _LOWEST : first - _LOWEST + width] += parts
        return _totals(parts, first)

    def totals(self) -> list[float]:
        return _totals(self._parts, _LOWEST)


def _totals(parts: Floats, first: int) -> list[float]:
    used = np.flatnonzero(parts.any((0, 1)))
    exponents = used + first
    terms = np.concatenate(
        [
            np.ldexp(part[:, used], exponents - bits)
            for part, bits in zip(parts, (_HIGH, _LOW), strict=True)
        ],
        axis=1,
    )
    return [math.fsum(row) for row in terms.tolist()]


def spread(values: Floats, total: float, *, whole: bool = False) -> dict[str, Any]:
    """count, min, quartiles, mean, max; and `counts` of the values in [edges[i], edges[i + 1]).

    values: sorted, without NaN. total: their exact sum. whole: they are whole numbers, and no bin
    is narrower than 1. With no values the figures are None and the histogram is empty.
    """
    count = len(values)
    if not count:
        names = ("min", "lower", "median", "upper", "mean", "max")
        return {"count": 0, **dict.fromkeys(names), "edges": [], "counts": []}
    edges = _edges(float(values[0]), float(values[-1]), whole)
    below = np.searchsorted(values, edges, "left")
    return {
        "count": count,
        "min": rounded(float(values[0])),
        "lower": rounded(quartile(values, 1)),
        "median": rounded(median(values)),
        "upper": rounded(quartile(values, 3)),
        "mean": rounded(total / count),
        "max": rounded(float(values[-1])),
        "edges": edges,
        "counts": np.diff(below).tolist(),
    }


def median(values: Floats) -> float:
    """Of sorted values: the middle one, or the mean of the two in the middle."""
    half = len(values) // 2
    return (
        float(values[half])
        if len(values) % 2
        else (float(values[half - 1]) + float(values[half])) / 2
    )


def quartile(values: Floats, part: int) -> float:
    """Of sorted values, by linear interpolation between the two around it (statistics.quantiles,
    inclusive).
    """
    at, rest = divmod(part * (len(values) - 1), 4)
    if not rest:
        return float(values[at])
    return (float(values[at]) * (4 - rest) + float(values[at + 1]) * rest) / 4


def rounded(value: float) -> float:
    return round(value, _DIGITS)


def _edges(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 × 10ⁿ from at or under `low` to over `high`."""
    step = _round_step((high - low) / _BINS)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    # the division may be off by a bit where a value lies on an edge
    first -= _edge(first, step) > low
    last += _edge(last, step) <= high
    return [_edge(index, step) for index in range(first, last + 1)]


def _edge(index: int, step: float) -> float:
    return round(index * step, 9)


def _round_step(least: float) -> float:
    if least <= 1e-9:
        return 0.01
    power: float = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)
