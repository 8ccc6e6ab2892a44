"""Executors: the same shard tasks, the same stages, the same bytes, in this process or on a Ray
cluster.

Only this package imports ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from configs.schema import DatasetConfig
from pipelines.chain import Chain
from pipelines.planning.plan import ShardTask
from stages.executors.counter import Advance
from stages.executors.inline import run_inline
from stages.executors.ray_data import run_ray
from stages.storage.commit import Manifest

__all__ = ["EXECUTORS", "Advance"]


class Executor(Protocol):
    def __call__(
        self,
        config: DatasetConfig,
        tasks: Sequence[ShardTask],
        advance: Advance,
        chain: Chain = ...,
    ) -> Iterator[Manifest]:
        """Yields the manifest of every shard as it is committed."""
        ...


EXECUTORS: Final[dict[str, Executor]] = {"inline": run_inline, "ray": run_ray}
