"""Metrics: the numbers of samples that the report and `inspect` show.

Most are sidecar columns that state a `Metric`, whichever stage recorded them. A few are computed
from other columns (DERIVED).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.distribution import Floats
from stages.fields import Column, Metric
from stages.regions import LABEL_IDS, LABELS, REGION_LABELS, REGION_WORDS
from stages.storage.sidecar import STANDARD_COLUMNS

AREA: Final = "area"
WORDS: Final = "words"
GROUPS: Final = ("image", "pose", "identity", "text", AREA, WORDS)


@dataclass(frozen=True, slots=True)
class ShownMetric:
    """A metric and its values. columns: the sidecar columns that `values` needs.

    values: takes a table with these columns; returns (rows,) float64, NaN where a row has no value.
    """

    name: str
    metric: Metric
    columns: tuple[str, ...]
    values: Callable[[pa.Table], Floats]


def shown_metrics(columns: Iterable[Column]) -> tuple[ShownMetric, ...]:
    """The metrics of sidecars with these columns, ordered by group."""
    stored = [
        ShownMetric(column.name, column.metric, (column.name,), _reader(column.name))
        for column in columns
        if column.metric is not None
    ]
    groups = {group: place for place, group in enumerate(GROUPS)}
    return tuple(
        sorted(
            [*stored, *DERIVED],
            key=lambda shown: groups.get(shown.metric.group, len(groups)),
        )
    )


def columns_of(metrics: Sequence[ShownMetric], columns: Mapping[str, Column]) -> list[Column]:
    """The sidecar columns that these metrics need, and `label_areas`."""
    names = [*(name for shown in metrics for name in shown.columns), "label_areas"]
    return [columns.get(name) or STANDARD_COLUMNS[name] for name in dict.fromkeys(names)]


def matrix(table: pa.Table, metrics: Sequence[ShownMetric]) -> Floats:
    """Values of the metrics (metrics, rows); NaN where a row has no value, or a region no pixel."""
    return np.stack([shown.values(table) for shown in metrics])


def label_matrix(table: pa.Table) -> Floats:
    """Area of each label (19, rows), 0 to 1 of the image; NaN where there is no label map."""
    return _lists(table["label_areas"], len(LABELS))


def region_areas(labels: Floats) -> Floats:
    """Area of each region (5, rows) from the areas of the labels (19, rows)."""
    return np.stack([_region_area(labels, word) for word in REGION_WORDS])


def _region_area(labels: Floats, word: str) -> Floats:
    """Labels are added in a fixed order, so that equal areas give equal sums."""
    total = np.zeros(labels.shape[1])
    for name in REGION_LABELS[word]:
        total = total + labels[LABEL_IDS[name]]
    return total


def _reader(name: str) -> Callable[[pa.Table], Floats]:
    return lambda table: _numbers(table[name])


def _numbers(column: pa.ChunkedArray) -> Floats:
    values: Floats = pc.cast(column, pa.float64()).to_numpy()  # nulls become NaN
    return values


def _lists(column: pa.ChunkedArray, size: int) -> Floats:
    """A column of lists with `size` numbers, or without any, as (size, rows) with NaN for none."""
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if not set(np.unique(lengths)) <= {0, size}:
        raise ValueError(f"lists of {sorted(set(lengths.tolist()))} numbers, expected {size} or 0")
    out = np.full((size, len(lengths)), np.nan)
    flat = pc.cast(pc.list_flatten(column), pa.float64()).to_numpy()
    out[:, lengths == size] = flat.reshape(-1, size).T
    return out


def _source_side(table: pa.Table) -> Floats:
    return np.minimum(_numbers(table["source_width"]), _numbers(table["source_height"]))


def _area(word: str) -> ShownMetric:
    def values(table: pa.Table) -> Floats:
        area = _region_area(label_matrix(table), word)
        area[area == 0] = np.nan
        return area

    metric = Metric(title=word, unit="%", note="of the image, where visible", scale=100, group=AREA)
    return ShownMetric(f"area_{word}", metric, ("label_areas",), values)


def _words(place: int, word: str) -> ShownMetric:
    def values(table: pa.Table) -> Floats:
        row: Floats = _lists(table["region_words"], len(REGION_WORDS))[place]
        return row

    note = "of the clause that names it"
    metric = Metric(title=word, unit="words", note=note, whole=True, group=WORDS)
    return ShownMetric(f"words_{word}", metric, ("region_words",), values)


DERIVED: Final = (
    ShownMetric(
        "source_side",
        Metric(title="Source size", unit="px", note="short side, before resizing", whole=True),
        ("source_width", "source_height"),
        _source_side,
    ),
    *(_area(word) for word in REGION_WORDS),
    *(_words(place, word) for place, word in enumerate(REGION_WORDS)),
)
