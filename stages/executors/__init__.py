"""Executors: run a chain of stages over shard tasks, in this process or on a Ray cluster. The
results are the same bytes.

Besides this package, only train.ray_train imports ray.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from stages.executors.job import Executor

_EXECUTORS: Final = {
    "inline": "stages.executors.inline:run_inline",
    "ray": "stages.executors.ray_data:run_ray",
}


def executor_named(name: str) -> Executor:
    """Returns the executor of the setting `executor`.

    It is imported here, not with the package: a small process, such as the counter's, imports one
    module of the package alone.
    """
    executor: Executor = resolve_name(_EXECUTORS[name])
    return executor
