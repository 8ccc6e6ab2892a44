"""Drift: the shards whose metrics or rates differ from those of the other shards.

A shard's value is its median of a metric (its mean, for whole numbers), or a rate. It is compared
with the median of all shards' values. The distance is in units, and a unit is the largest of:
the spread of the shards' values (1.4826 × median absolute deviation); the least difference that
matters (a twentieth of the spread of the samples, or 0.02 of a rate); and the standard error for a
shard of this size. A shard of at least 50 samples and a distance over 5 units is flagged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipelines.report.distribution import Floats, median, rounded

MIN_SAMPLES: Final = 50
MAX_DISTANCE: Final = 5.0  # units


@dataclass(frozen=True, slots=True)
class Series:
    """A metric or rate of every shard.

    values: (shards,), NaN where a shard has none. counts: (shards,), samples behind each value.
    scale: spread of the samples, as interquartile range or, for whole numbers, standard deviation;
    None for a rate.
    """

    name: str
    values: Floats
    counts: Floats
    scale: float | None


def distances(series: Series) -> tuple[float | None, Floats]:
    """(median of the shards' values, distance of each shard from it in units); None and NaN where
    there is no value. A distance is infinite where all other values are equal."""
    present = np.sort(series.values[~np.isnan(series.values)])
    if not len(present):
        return None, np.full(len(series.values), np.nan)
    middle = median(present)
    differences = series.values - middle
    spread = 1.4826 * median(np.sort(np.abs(present - middle)))
    least = 0.02 if series.scale is None else series.scale / 20
    deviation = series.scale
    if deviation is None:
        deviation = math.sqrt(max(0.0, middle * (1 - middle)))
    unit = np.maximum(max(spread, least), deviation / np.sqrt(np.maximum(series.counts, 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return middle, np.where(differences == 0, 0.0, differences / unit)


def flags(series: Series, shards: list[str]) -> tuple[dict[str, Any], Floats]:
    """(entry of the stats, distances). In the entry, an infinite distance (`away`) is None."""
    middle, away = distances(series)
    far = np.flatnonzero((np.abs(away) > MAX_DISTANCE) & (series.counts >= MIN_SAMPLES))
    flagged = [
        {
            "shard": shards[at],
            "value": rounded(float(series.values[at])),
            "away": round(float(away[at]), 2) if np.isfinite(away[at]) else None,
            "count": int(series.counts[at]),
        }
        for at in far
    ]
    return {"middle": None if middle is None else rounded(middle), "flagged": flagged}, away
