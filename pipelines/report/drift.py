"""Drift: how far each shard lies from the others, in units that chance alone would rarely exceed.

A shard's value is its median of a figure (its mean, of whole numbers; its share, of a rate), and
its distance that from the middle shard's. A unit is the largest of three: how much the shards
themselves spread (1.4826 × median absolute deviation), the least that matters (a twentieth of the
samples' own spread; two hundredths of a rate), and what chance does to a shard of this size. A
shard of at least 50 that lies more than 5 units away is flagged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipelines.report.distribution import Floats, median, rounded

LEAST: Final = 50
LIMIT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Track:
    """One figure over the shards. values: NaN where a shard has none. counts: samples behind each.
    scale: what the samples themselves spread (interquartile range, standard deviation); None for a
    rate.
    """

    name: str
    values: Floats
    counts: Floats
    scale: float | None


def distances(track: Track) -> tuple[float | None, Floats]:
    """(the middle shard's value, each shard's distance from it in units); NaN where there is
    nothing to compare.
    """
    present = np.sort(track.values[~np.isnan(track.values)])
    if not len(present):
        return None, np.full(len(track.values), np.nan)
    middle = median(present)
    apart = track.values - middle
    shards = 1.4826 * median(np.sort(np.abs(present - middle)))
    least = 0.02 if track.scale is None else track.scale / 20
    deviation = math.sqrt(max(0.0, middle * (1 - middle))) if track.scale is None else track.scale
    unit = np.maximum(max(shards, least), deviation / np.sqrt(np.maximum(track.counts, 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        # no spread at all: whatever differs is infinitely far
        away = np.where(apart == 0, 0.0, apart / unit)
    return middle, away


def flags(track: Track, shards: list[str]) -> tuple[dict[str, Any], Floats]:
    """(entry of the stats, distances). An entry's `away` is None where nothing else varies."""
    middle, away = distances(track)
    far = np.flatnonzero((np.abs(away) > LIMIT) & (track.counts >= LEAST))
    flagged = [
        {
            "shard": shards[at],
            "value": rounded(float(track.values[at])),
            "away": round(float(away[at]), 2) if np.isfinite(away[at]) else None,
            "count": int(track.counts[at]),
        }
        for at in far
    ]
    return {"middle": None if middle is None else rounded(middle), "flagged": flagged}, away
