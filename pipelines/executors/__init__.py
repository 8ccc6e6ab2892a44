"""Executors: the same shard tasks, the same stages, the same bytes, in this process or on a Ray cluster.

Only this package imports ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from configs.schema import DatasetConfig
from pipelines.executors.counter import Advance
from pipelines.executors.inline import run_inline
from pipelines.executors.ray_data import run_ray
from pipelines.plan import ShardTask
from pipelines.shards import Manifest

__all__ = ["EXECUTORS", "Advance"]

EXECUTORS: Final[dict[str, Callable[[DatasetConfig, Sequence[ShardTask], Advance], Iterator[Manifest]]]] = {
    "inline": run_inline,
    "ray": run_ray,
}
"""Each yields the manifest of every shard as it is committed."""
