"""Groups: which stages share an actor, and how many of each fit into a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from configs.errors import ConfigError
from configs.schema import DatasetConfig
from stages.base import Stage

TASK_CPUS: Final = 0.25  # of a read or write task
_SPARE_CPUS: Final = (
    2 * TASK_CPUS
)  # kept free of actors: with none left, reads could never start and the run would hang


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring stages that share an actor: chain[first:last], with what one copy holds, and how many copies."""

    first: int
    last: int
    names: tuple[str, ...]
    cpus: float
    gpus: float
    copies: int


def plan_groups(config: DatasetConfig, stages: Sequence[Stage], cpus: float, gpus: float) -> list[Group]:
    """Fit the actors into a cluster's free resources, leaving room for read and write tasks.

    Copies are shared out evenly and shrunk to fit; where not even one of each fits, so are their fractions of a CPU.
    Raises ConfigError where GPUs are asked for that the cluster doesn't have.
    """
    runs = [list(run) for _, run in groupby(enumerate(stages), lambda pair: _holds(pair[1]))]
    needs = [_holds(run[0][1]) for run in runs]
    if sum(need[1] for need in needs) > gpus + 1e-9:
        wanted = ", ".join(f"{run[0][1].name}: {need[1]:g}" for run, need in zip(runs, needs, strict=True) if need[1])
        raise ConfigError(
            f"the stages ask for {sum(n[1] for n in needs):g} GPUs ({wanted}), the cluster has {gpus:g}. "
            "Lower their placement.gpus, or start nodes that have them."
        )
    room = cpus - _SPARE_CPUS
    total = sum(need[0] for need in needs)
    if room <= 0:
        raise ConfigError(f"the cluster has {cpus:g} CPUs, expected over {_SPARE_CPUS:g}. Start a node with more.")
    shrink = min(1.0, room / total)
    copies = config.ray.workers or max(1, int(room / total + 1e-9))
    copies = max(1, min(copies, int(room / (total * shrink) + 1e-9)))
    on_gpus = sum(need[1] for need in needs)
    copies = max(1, min(copies, int(gpus / on_gpus + 1e-9))) if on_gpus else copies
    return [
        Group(run[0][0], run[-1][0] + 1, tuple(s.name for _, s in run), round(need[0] * shrink, 4), need[1], copies)
        for run, need in zip(runs, needs, strict=True)
    ]


def _holds(stage: Stage) -> tuple[float, float]:
    return stage.resources.cpus, stage.resources.gpus
