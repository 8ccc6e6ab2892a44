"""Watchdog: what every shard in hand is doing, and since when nothing has come of it.

It lives where shards are counted (on Ray, beside the driver), so it speaks even when a worker hangs
in a C library that never lets Python's threads run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stuck:
    """A shard in whose stage nothing has moved for `seconds`; where: the host and process that
    holds it.
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
    """Told `at` when a shard enters a stage with its next few pictures, and `done` when it leaves
    the worker.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at: dict[int, tuple[str, str, float]] = {}

    def at(self, shard: int, stage: str, where: str) -> None:
        self._at[shard] = (stage, where, self._clock())

    def done(self, shard: int) -> None:
        self._at.pop(shard, None)

    def stuck(self, longer_than: float) -> list[Stuck]:
        """Shards in which nothing has moved for that many seconds, the longest first."""
        now = self._clock()
        found = [
            Stuck(shard, stage, where, now - since)
            for shard, (stage, where, since) in self._at.items()
        ]
        return sorted((s for s in found if s.seconds > longer_than), key=lambda s: -s.seconds)
