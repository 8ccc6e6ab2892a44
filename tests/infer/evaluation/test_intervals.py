"""Bootstrap intervals over identities."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import ConfigError, PipelineError
from infer.evaluation.intervals import interval, mean, named_seed, ratio


def test_an_interval_is_that_of_a_mean_of_independent_identities() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    measured = interval({str(i): float(v) for i, v in enumerate(values)}, seed=1, name="a")
    half = 1.96 * values.std() / 20
    assert measured.mean == pytest.approx(values.mean()) and measured.identities == 400
    assert measured.mean - measured.low == pytest.approx(half, rel=0.1)
    assert measured.high - measured.mean == pytest.approx(half, rel=0.1)


def test_an_interval_depends_on_seed_and_name_only() -> None:
    values: dict[str, float | None] = {str(i): (i * 0.37) % 1 for i in range(20)} | {"a": None}
    first = interval(values, seed=1, name="a")
    assert interval(values, seed=1, name="a") == first and first.identities == 20
    assert interval(values, seed=2, name="a") != first != interval(values, seed=1, name="b")
    assert 0 < first.low < first.mean < first.high < 1


def test_a_ratio_is_of_means_over_the_same_identities() -> None:
    upper = {"a": 4.0, "b": 8.0, "c": 100.0}
    lower: dict[str, float | None] = {"a": 1.0, "b": 2.0, "c": None}
    measured = ratio(upper, lower, seed=1, name="a")
    assert (measured.mean, measured.low, measured.high, measured.identities) == (4, 4, 4, 2)
    assert ratio(upper, dict.fromkeys(upper, 0.0), seed=1, name="a", least=0.5).low == 8


def test_without_finite_values_there_is_no_interval() -> None:
    with pytest.raises(ConfigError, match="smiles: none of 2 identities has a value"):
        interval({"a": None, "b": None}, seed=1, name="smiles")
    with pytest.raises(
        PipelineError, match="loss: 1 of 2 identities have a value that isn't finite"
    ):
        interval({"a": float("nan"), "b": 1.0}, seed=1, name="loss")
    assert mean([]) is None and mean([1.0, 2.0]) == 1.5


def test_a_seed_is_of_all_names_in_their_order() -> None:
    seeds = {named_seed(1, "a", "b"), named_seed(1, "b", "a"), named_seed(2, "a", "b")}
    assert len(seeds) == 3 and all(0 <= seed < 2**63 for seed in seeds)
