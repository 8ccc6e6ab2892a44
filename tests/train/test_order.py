"""The order of samples: one and several data sets, and where a sample is."""

from __future__ import annotations

from collections import Counter

import pytest

from configs.errors import ConfigError
from train.order import SampleOrder

SIZES = [7, 1_200, 31]


def test_a_mixture_has_each_data_set_at_its_share_in_epochs() -> None:
    order = SampleOrder(SIZES, 3, [1, 2, 1])
    numbers = [order.sample(position) for position in range(20_000)]
    counts = Counter(numbers)
    by_set = [range(7), range(7, 1_207), range(1_207, 1_238)]
    for samples, share in zip(by_set, (5_000, 10_000, 5_000), strict=True):
        uses = [counts[number] for number in samples]
        assert sum(uses) == share and max(uses) - min(uses) <= 1


def test_the_shares_hold_in_short_stretches_too() -> None:
    order = SampleOrder(SIZES, 3, [1, 2, 1])
    for start in range(0, 20_000, 1_000):
        large = sum(7 <= order.sample(p) < 1_207 for p in range(start, start + 1_000))
        assert 420 < large < 580  # five standard deviations


def test_without_weights_shares_are_those_of_the_sizes() -> None:
    order = SampleOrder([100, 300], 3)
    numbers = [order.sample(position) for position in range(10_000)]
    assert sum(number < 100 for number in numbers) == 2_500


@pytest.mark.parametrize("sizes", [[5], [1], [7, 13], SIZES])
@pytest.mark.parametrize("end", [1, 999, 12_345])
def test_the_positions_of_a_sample_are_those_at_which_it_is_used(
    sizes: list[int], end: int
) -> None:
    order = SampleOrder(sizes, 3)
    numbers = [order.sample(position) for position in range(end)]
    for number in range(0, len(order), max(1, len(order) // 20)):
        expected = [position for position, used in enumerate(numbers) if used == number]
        assert sorted(order.positions(number, end)) == expected


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_a_weight_that_gives_a_data_set_no_position_is_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        SampleOrder([8, 8], 3, weights)
