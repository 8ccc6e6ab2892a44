"""Executors: run a chain of stages over shard tasks, in this process or on a Ray cluster. The
results are the same bytes.

No other package imports ray.
"""

from __future__ import annotations

from typing import Final

from stages.executors.inline import run_inline
from stages.executors.job import Advance, ChainReference, Executor, ExecutorSettings
from stages.executors.ray_data import run_ray

__all__ = ["EXECUTORS", "Advance", "ChainReference", "ExecutorSettings"]

EXECUTORS: Final[dict[str, Executor]] = {"inline": run_inline, "ray": run_ray}
