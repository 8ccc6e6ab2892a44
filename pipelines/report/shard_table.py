"""Shard table: report/stats.parquet, with a row for each shard; and the shards that drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.report.distribution import Floats
from pipelines.report.drift import Series, flags
from pipelines.report.metrics import ShownMetric
from pipelines.report.scan import Scan
from stages.record import Status
from stages.regions import REGION_WORDS


@dataclass(frozen=True, slots=True)
class Shards:
    """The numbers of all shards. means, medians, counts: of each metric (shards, metrics)."""

    scans: Sequence[Scan]
    metrics: Sequence[ShownMetric]
    means: Floats
    medians: Floats
    counts: Floats

    @property
    def cut(self) -> list[int]:
        """Number of samples with cut captions in each shard."""
        return self.positive("cut")

    def positive(self, metric: str) -> list[int]:
        """Number of samples in each shard whose `metric` is over 0; 0 where it isn't measured."""
        places = [i for i, shown in enumerate(self.metrics) if shown.name == metric]
        return [int((part.values[places] > 0).sum()) for part in self.scans]


def shard_entry(part: Scan) -> dict[str, Any]:
    """Numbers of inputs and bytes of one shard, JSON-ready."""
    return {
        "shard": part.name,
        "inputs": part.inputs,
        "written": part.of(Status.OK),
        "dropped": part.of(Status.DROPPED),
        "failed": part.of(Status.FAILED),
        "tar_bytes": part.tar_bytes,
        "quarantine_bytes": part.quarantine_bytes,
    }


def shard_table(
    shards: Shards, distributions: Mapping[str, Any], runs: Mapping[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """(the table; for each metric and rate, the shards that drift, JSON-ready).

    distributions: of each metric over all samples. runs: see runs.run_summary.
    """
    entries = [shard_entry(part) for part in shards.scans]
    columns: dict[str, Any] = {name: [entry[name] for entry in entries] for name in entries[0]}
    for name in ("seconds", "images_per_second"):
        columns[name] = [run[name] for run in runs["shards"]]
    for stage in runs["stage_seconds"]:
        columns[f"seconds_{stage}"] = [run["stage_seconds"].get(stage) for run in runs["shards"]]
    every_series = _rates(shards)
    columns |= {series.name: _nulls(series.values) for series in every_series}
    for at, shown in enumerate(shards.metrics):
        counts, means, medians = (
            values[:, at] for values in (shards.counts, shards.means, shards.medians)
        )
        columns[f"{shown.name}_count"] = counts
        columns[f"{shown.name}_mean"] = _nulls(means)
        columns[f"{shown.name}_median"] = _nulls(medians)
        whole_set = distributions[shown.name]
        if not whole_set["count"]:
            continue
        if shown.metric.whole:
            scale = _deviation(whole_set["count"], shards.scans, at)
            every_series.append(Series(shown.name, means, counts, scale))
        else:
            scale = whole_set["upper"] - whole_set["lower"]
            every_series.append(Series(shown.name, medians, counts, scale))
    drift = {}
    names = [part.name for part in shards.scans]
    for series in every_series:
        entry, away = flags(series, names)
        drift[series.name] = entry
        columns[f"{series.name}_away"] = _nulls(away)
    return pa.table(columns), drift


def _deviation(count: int, scans: Sequence[Scan], at: int) -> float:
    """Standard deviation of a metric of whole numbers over all samples, from exact sums."""
    squares = sum(int(np.nansum(np.square(part.values[at]))) for part in scans)
    total = sum(int(np.nansum(part.values[at])) for part in scans)
    return float(np.sqrt((count * squares - total**2) / count**2))


def _rates(shards: Shards) -> list[Series]:
    """Shares of each shard: of its inputs, those written; of its samples, those that are trainable,
    have cut captions, or lack a region."""
    scans = shards.scans
    inputs = np.array([part.inputs for part in scans], float)
    written = np.array([part.of(Status.OK) for part in scans], float)
    trainable = np.array([part.tally["trainable", "yes"] for part in scans], float)
    reviewed = trainable + [part.tally["trainable", "no"] for part in scans]
    parsed = np.array([part.tally["parsed",] for part in scans], float)
    shares = [
        ("written_share", written, inputs),
        ("trainable_share", trainable, reviewed),
        ("cut_share", shards.cut, reviewed),
        *(
            (f"missing_{word}_share", [part.tally["missing", word] for part in scans], parsed)
            for word in REGION_WORDS
        ),
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        return [
            Series(name, np.where(whole > 0, np.asarray(part, float) / whole, np.nan), whole, None)
            for name, part, whole in shares
        ]


def _nulls(values: Floats) -> pa.Array:
    """A column of numbers, with null in place of NaN and infinity."""
    return pa.array(values, pa.float64(), mask=~np.isfinite(values))
