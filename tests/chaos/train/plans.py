"""What happens in each round: how often the command is started, and what stops it each time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.chaos.train.command import Layout

GLOBAL_BATCH = 4  # samples of a step
FAULTS = ("rank killed", "all killed", "SIGTERM to all", "SIGINT to a rank", "disk full")
# Of the undisturbed runs, and of rounds whose starts all have the same number of processes. One
# process takes two micro-batches in a step, each of two processes as well.
MICRO = {1: 2, 2: 1, 4: 1}
_EARLIEST = 0.3  # share of faults that come before the first step
_FIRST_ROUNDS: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = (
    ((4, 4), ("SIGTERM to all",)),
    ((2, 1, 2), ("rank killed", "SIGINT to a rank")),
    ((1, 1, 1, 1), ("disk full", "SIGTERM to all", "all killed")),
)
_LATER = ((2, 2, 2, 2), (1, 4, 2), (4, 4, 4), (2, 1, 4), (1, 1, 1, 1), (1, 2, 1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start of the command. fault: what stops it, "" for the last one. after: at which share of
    the remaining steps, 0 for a time before the first step. damage: whether the newest checkpoint
    is damaged before this start.
    """

    layout: Layout
    fault: str
    after: float
    damage: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A round. same: all starts have the same number of processes and micro-batch."""

    starts: tuple[Start, ...]
    same: bool

    def __str__(self) -> str:
        numbers = [start.layout.processes for start in self.starts]
        if self.same:
            return f"{numbers[0]} process{'es' if numbers[0] > 1 else ''}"
        return f"{', then '.join(map(str, numbers))} processes"

    @property
    def on_small_disk(self) -> bool:
        return any(start.fault == "disk full" for start in self.starts)


def plan_round(number: int, seed: int) -> Plan:
    """Returns the plan of a round. The first three rounds have every kind of fault; the times are
    random in all rounds.
    """
    rng = random.Random(f"{seed}-{number}")
    if number < len(_FIRST_ROUNDS):
        counts, faults = _FIRST_ROUNDS[number]
        earliest, damaged = 0.0, {len(counts) - 1}
    else:
        counts = _LATER[(number - len(_FIRST_ROUNDS)) % len(_LATER)]
        faults = tuple(rng.sample(FAULTS, len(counts) - 1))
        earliest = _EARLIEST
        damaged = {n for n in range(1, len(counts)) if rng.random() < 0.5}
    same = len({*counts}) == 1
    starts = tuple(
        Start(
            layout=_layout(count, same, rng),
            fault=fault,
            after=_time(fault, len(counts) - index, earliest, rng),
            damage=index in damaged,
        )
        for index, (count, fault) in enumerate(zip(counts, (*faults, ""), strict=True))
    )
    return Plan(starts, same)


def _layout(count: int, same: bool, rng: random.Random) -> Layout:
    share = GLOBAL_BATCH // count
    micro = MICRO[count] if same else rng.choice([n for n in (1, 2, 4) if n <= share])
    return Layout(processes=count, workers=rng.randrange(3), micro=micro)


def _time(fault: str, starts_left: int, earliest: float, rng: random.Random) -> float:
    """Returns a share of the remaining steps, such that later starts have some left."""
    if fault != "disk full" and rng.random() < earliest:
        return 0.0
    return rng.uniform(0.1, 1.0) / starts_left
