"""Placement: which stages share a worker, and how many workers fit into a cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from configs.errors import ConfigError
from stages.base import Stage

TASK_CPUS: Final = 0.25  # of a read or write task
# Kept free of workers. If they took everything, read tasks could never start: the run would hang.
_SPARE_CPUS: Final = 2 * TASK_CPUS
_TOLERANCE: Final = 1e-9  # of sums of fractions


class Resources(NamedTuple):
    """Of a node, a worker or a whole cluster; fractions are allowed."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive stages, chain[first:last], that run in one process.

    cpus, gpus: of each worker. workers: number of such processes.
    """

    first: int
    last: int
    names: tuple[str, ...]
    cpus: float
    gpus: float
    workers: int


def plan_groups(
    stages: Sequence[Stage],
    nodes: Sequence[Resources],
    workers: int = 0,
    shards: int = sys.maxsize,
) -> list[Group]:
    """Groups consecutive stages with equal resources, and fits the groups' workers into the nodes
    beside the read and write tasks.

    Every group gets the same number of workers: the number of whole chains that fit, each on one
    node; at most `shards`, and at most `workers` unless that is 0. If no node can hold a whole
    chain, each group gets one worker, with fewer CPUs so that all fit into the cluster. Raises
    ConfigError if that is impossible too.
    """
    indexed = enumerate(stages)
    runs = [list(run) for _, run in groupby(indexed, lambda pair: _resources(pair[1]))]
    needs = [_resources(run[0][1]) for run in runs]
    chain, cluster = _total(needs), _total(nodes)
    if chain.gpus > cluster.gpus + _TOLERANCE:
        by_stage = ", ".join(
            f"{run[0][1].name}: {need.gpus:g}"
            for run, need in zip(runs, needs, strict=True)
            if need.gpus
        )
        raise ConfigError(
            f"the stages ask for {chain.gpus:g} GPUs ({by_stage}), the cluster has "
            f"{cluster.gpus:g}. Lower their placement.gpus, or start nodes that have them."
        )
    room = cluster.cpus - _SPARE_CPUS
    if room <= 0:
        raise ConfigError(
            f"the cluster has {cluster.cpus:g} CPUs, expected more than {_SPARE_CPUS:g}. Start a "
            "larger node."
        )
    fit = sum(_fit(chain, node) for node in nodes)
    count = max(1, min(workers or fit, fit, shards))
    scale = 1.0 if fit else min(1.0, room / chain.cpus)
    return [
        Group(
            first=run[0][0],
            last=run[-1][0] + 1,
            names=tuple(stage.name for _, stage in run),
            cpus=round(need.cpus * scale, 4),
            gpus=need.gpus,
            workers=count,
        )
        for run, need in zip(runs, needs, strict=True)
    ]


def _fit(chain: Resources, node: Resources) -> int:
    """Returns how many whole chains the node can hold beside read and write tasks."""
    fit = max(0, int((node.cpus - _SPARE_CPUS) / chain.cpus + _TOLERANCE))
    return min(fit, int(node.gpus / chain.gpus + _TOLERANCE)) if chain.gpus else fit


def _total(parts: Sequence[Resources]) -> Resources:
    return Resources(sum(part.cpus for part in parts), sum(part.gpus for part in parts))


def _resources(stage: Stage) -> Resources:
    return Resources(stage.resources.cpus, stage.resources.gpus)
