"""Drift: shards that differ are flagged, and others not."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.report.drift import Series, flags
from stages.storage.store import Store
from tests.pipelines.report.helpers import stats_of


def test_the_odd_shard_is_flagged_and_no_other(synthetic: Store) -> None:
    drift = stats_of(synthetic)["data"]["drift"]
    flagged = {
        name: [flag["shard"] for flag in entry["flagged"]]
        for name, entry in drift.items()
        if entry["flagged"]
    }
    assert flagged == {"sharpness": ["fgid-000003"], "brightness": ["fgid-000003"]}


@pytest.mark.parametrize("size", [50, 1000])
def test_shards_that_differ_by_chance_are_not_flagged(size: int) -> None:
    """A thousand small shards and a thousand large ones of the same distribution: at most one in a
    thousand is flagged."""
    rng, counts = np.random.default_rng(size), np.repeat([size, 1000], 1000)
    normal = np.array([np.median(rng.normal(size=n)) for n in counts])
    shares = np.array([rng.binomial(n, 0.8) / n for n in counts])
    names = [str(at) for at in range(2000)]
    for series in (Series("x", normal, counts, 1.349), Series("y", shares, counts, None)):
        entry, _ = flags(series, names)
        assert len(entry["flagged"]) <= 2
        moved = np.append(series.values[1:], series.values[0] + (1.349 if series.scale else -0.4))
        assert "1999" in [
            flag["shard"]
            for flag in flags(Series("z", moved, counts, series.scale), names)[0]["flagged"]
        ]


def test_where_all_shards_are_equal_one_that_differs_is_flagged() -> None:
    series = Series("x", np.array([1.0] * 9 + [2.0]), np.full(10, 60), 0.0)
    entry, away = flags(series, list("abcdefghij"))
    assert entry["flagged"] == [{"shard": "j", "value": 2.0, "away": None, "count": 60}]
    assert away[:9].tolist() == [0.0] * 9
