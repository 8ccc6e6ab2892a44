"""Groups: which stages share an actor, and how many of each fit into a cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from configs.errors import ConfigError
from configs.schema import DatasetConfig
from stages.base import Stage

TASK_CPUS: Final = 0.25  # of a read or write task
_SPARE_CPUS: Final = (
    2 * TASK_CPUS
)  # kept free of actors: with none left, reads could never start and the run would hang
_SLACK: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring stages that share an actor: chain[first:last], with what one copy holds, and how
    many copies.
    """

    first: int
    last: int
    names: tuple[str, ...]
    cpus: float
    gpus: float
    copies: int


class Node(NamedTuple):
    """What a node of the cluster has to give."""

    cpus: float
    gpus: float


def plan_groups(
    config: DatasetConfig, stages: Sequence[Stage], nodes: Sequence[Node], shards: int = sys.maxsize
) -> list[Group]:
    """Fit the actors into the nodes, leaving room on each for read and write tasks.

    As many copies of the whole chain as the nodes hold, each on one node, but no more than there
    are shards. Where no node holds one, the groups get one copy each, with their fractions of a CPU
    shrunk to fit the cluster. Raises ConfigError where that won't do either.
    """
    runs = [list(run) for _, run in groupby(enumerate(stages), lambda pair: _holds(pair[1]))]
    needs = [_holds(run[0][1]) for run in runs]
    cpus, gpus = sum(need[0] for need in needs), sum(need[1] for need in needs)
    given = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    if gpus > given.gpus + _SLACK:
        wanted = ", ".join(
            f"{run[0][1].name}: {need[1]:g}"
            for run, need in zip(runs, needs, strict=True)
            if need[1]
        )
        raise ConfigError(
            f"the stages ask for {gpus:g} GPUs ({wanted}), the cluster has {given.gpus:g}. "
            "Lower their placement.gpus, or start nodes that have them."
        )
    room = given.cpus - _SPARE_CPUS
    if room <= 0:
        raise ConfigError(
            f"the cluster has {given.cpus:g} CPUs, expected over {_SPARE_CPUS:g}. Start a larger "
            "node."
        )
    fit = sum(_fit(node.cpus - _SPARE_CPUS, cpus, node.gpus, gpus) for node in nodes)
    copies = max(1, min(config.ray.workers or fit, fit, shards))
    shrink = 1.0 if fit else min(1.0, room / cpus)
    return [
        Group(
            run[0][0],
            run[-1][0] + 1,
            tuple(s.name for _, s in run),
            round(need[0] * shrink, 4),
            need[1],
            copies,
        )
        for run, need in zip(runs, needs, strict=True)
    ]


def _fit(room: float, cpus: float, gpus_room: float, gpus: float) -> int:
    """How many copies of `cpus` and `gpus` a node with that room holds."""
    fit = max(0, int(room / cpus + _SLACK))
    return min(fit, int(gpus_room / gpus + _SLACK)) if gpus else fit


def _holds(stage: Stage) -> tuple[float, float]:
    return stage.resources.cpus, stage.resources.gpus
