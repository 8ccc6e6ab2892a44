"""Watchdog: which stage each running shard is in, and for how long.

It runs outside the workers (on Ray, beside the driver), so it can report a worker that hangs in a C
library and blocks its own Python threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stuck:
    """A shard that has not left `stage`, or begun its next chunk there, for `seconds`.

    where: host and process that run it.
    """

    shard: int
    stage: str
    where: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"shard {self.shard} has been stuck in {self.stage} for {self.seconds:.0f} s "
            f"({self.where})"
        )


class Watchdog:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entered: dict[int, tuple[str, str, float]] = {}

    def enter(self, shard: int, stage: str, where: str) -> None:
        """A shard enters a stage with its next chunk of records."""
        self._entered[shard] = (stage, where, self._clock())

    def leave(self, shard: int) -> None:
        """A shard is in no stage, for now. Harmless if it was in none."""
        self._entered.pop(shard, None)

    def stuck(self, longer_than: float) -> list[Stuck]:
        """The shards whose last `enter` is more than that many seconds ago, longest first."""
        now = self._clock()
        running = [
            Stuck(shard, stage, where, now - since)
            for shard, (stage, where, since) in self._entered.items()
        ]
        return sorted((s for s in running if s.seconds > longer_than), key=lambda s: -s.seconds)
