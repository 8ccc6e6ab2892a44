"""Seeds from names, and bootstrap intervals over identities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError, PipelineError

Floats = npt.NDArray[np.float64]

_RESAMPLES: Final = 4000
_PERCENTILES: Final = (2.5, 97.5)


def named_seed(seed: int, *names: str | int) -> int:
    """Returns the seed of the random numbers with these names, in [0, 2**63)."""
    name = "/".join(map(str, ("consistentid/evaluation", seed, *names)))
    # 63 bits are the most that torch accepts
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over identities, with the ends of its 95 % bootstrap interval.

    identities: how many it is of; those without a value aren't counted.
    """

    mean: float
    low: float
    high: float
    identities: int


def interval(values: Mapping[str, float | None], *, seed: int, name: str) -> Interval:
    """Returns the mean of the identities' values with its interval.

    values: identity → its value, None for one that has none. Whole identities are drawn with
    replacement, not pictures, since pictures of a person aren't independent. name: of the measure,
    from which the random numbers come. Raises ConfigError if no identity has a value, PipelineError
    if one isn't finite.
    """
    column = _column(values, name)
    return _bootstrap([column], lambda means: means[0], seed, name)


def ratio(
    upper: Mapping[str, float | None],
    lower: Mapping[str, float | None],
    *,
    seed: int,
    name: str,
    least: float = 0.0,
) -> Interval:
    """Returns the ratio of two means over the same identities, with its interval.

    least: a mean in the denominator that is smaller counts as this, so that the ratio is finite.
    Raises ConfigError as `interval`.
    """
    both = [key for key in upper if upper[key] is not None and lower.get(key) is not None]
    columns = [_column({key: side[key] for key in both}, name) for side in (upper, lower)]
    return _bootstrap(columns, lambda means: means[0] / np.maximum(means[1], least), seed, name)


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean of finite numbers; None without any."""
    return float(np.mean(values)) if len(values) else None


def _column(values: Mapping[str, float | None], name: str) -> Floats:
    column = np.array([value for value in values.values() if value is not None], np.float64)
    if not len(column):
        raise ConfigError(
            f"{name}: none of {len(values)} identities has a value, expected at least one; give "
            "more people, or check that the pictures show faces"
        )
    if not np.isfinite(column).all():
        raise PipelineError(
            f"{name}: {int((~np.isfinite(column)).sum())} of {len(column)} identities have a value "
            "that isn't finite. Use dtype=float32 or bfloat16; if that doesn't help, the adapter's "
            "weights are damaged."
        )
    return column


def _bootstrap(
    columns: Sequence[Floats], statistic: Callable[[Any], Any], seed: int, name: str
) -> Interval:
    """statistic: the means of the columns, each of any shape → the statistic, of that shape."""
    count = len(columns[0])
    random = np.random.Generator(np.random.PCG64(named_seed(seed, "bootstrap", name)))
    rows = random.integers(count, size=(_RESAMPLES, count))
    low, high = np.percentile(
        statistic([column[rows].mean(axis=1) for column in columns]), _PERCENTILES
    )
    middle = statistic([column.mean() for column in columns])
    return Interval(mean=float(middle), low=float(low), high=float(high), identities=count)
