"""Distributions: histograms hold every value once, and sums are exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.report.distribution import Sums, distribution_of


@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60), st.booleans()
)
def test_a_histogram_holds_every_value_once(numbers: list[float], whole: bool) -> None:
    numbers = [float(round(value)) for value in numbers] if whole else numbers
    distribution = distribution_of(np.sort(numbers), math.fsum(numbers), whole=whole)
    edges, counts = distribution["edges"], distribution["counts"]
    assert edges == sorted(set(edges))
    assert edges[0] <= min(numbers) <= max(numbers) < edges[-1]
    assert sum(counts) == len(numbers) and len(counts) <= 26
    assert counts == [
        sum(a <= value < b for value in numbers) for a, b in itertools.pairwise(edges)
    ]
    assert not whole or all(float(edge).is_integer() for edge in edges)


@given(
    st.lists(st.lists(st.none() | st.floats(-1e300, 1e300), min_size=3, max_size=3), max_size=30),
    st.integers(1, 5),
)
def test_sums_are_exact_in_any_order_and_merge(rows: list[list[float | None]], parts: int) -> None:
    matrix = np.array(rows, float).reshape(-1, 3).T  # None becomes NaN
    sums = Sums(3)
    for part in np.array_split(matrix[:, ::-1], parts, axis=1):
        assert sums.add(part) == [math.fsum(row[~np.isnan(row)]) for row in part]
    assert sums.totals() == [math.fsum(row[~np.isnan(row)]) for row in matrix]
