"""Distribution of a metric: a histogram with round edges, and exact minimum, quartiles, mean and
maximum.

Sums are exact: each value is split into integers and a power of two, and integers add without
rounding. So sums don't depend on the order of the values, and the sums of shards add up to the sum
of the data set.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS = 24  # a histogram has about this many, or fewer
_DECIMALS = 6  # statistics are rounded to this many
_LOWEST: Final = -1080  # less than the exponent of any double
_EXPONENTS: Final = 2120
# A double's 53 bits are split into 27 high and 26 low ones: sums of 2²⁶ values of either are exact.
_HIGH: Final = 27
_LOW: Final = 53


class Sums:
    """Exact sums of the rows of matrices (rows, N) that are added one after the other. NaN is
    ignored."""

    def __init__(self, rows: int) -> None:
        self._parts = np.zeros((2, rows, _EXPONENTS))

    def add(self, values: Floats) -> list[float]:
        """Adds the values; returns the sum of each row of this matrix alone, rounded once."""
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
        """The sum of each row over all matrices, rounded once."""
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


def distribution_of(values: Floats, total: float, *, whole: bool = False) -> dict[str, Any]:
    """count, min, quartiles, median, mean, max, and a histogram: `counts[i]` values are in
    [edges[i], edges[i + 1]).

    values: sorted, without NaN. total: their exact sum. whole: they are whole numbers, and bins are
    at least 1 wide. Without values the statistics are None and the histogram is empty.
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
    """The median of sorted values: the middle one, or the mean of the two in the middle."""
    half = len(values) // 2
    return (
        float(values[half])
        if len(values) % 2
        else (float(values[half - 1]) + float(values[half])) / 2
    )


def quartile(values: Floats, part: int) -> float:
    """Quartile 1 or 3 of sorted values, interpolated linearly (as statistics.quantiles does with
    method="inclusive")."""
    at, rest = divmod(part * (len(values) - 1), 4)
    if not rest:
        return float(values[at])
    return (float(values[at]) * (4 - rest) + float(values[at + 1]) * rest) / 4


def rounded(value: float) -> float:
    return round(value, _DECIMALS)


def _edges(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 × 10ⁿ; the first is at most `low`, the last greater than `high`."""
    step = _round_step((high - low) / _BINS)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    # Where a value is on an edge, the division may be wrong in the last bit.
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
