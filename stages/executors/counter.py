"""What must survive the workers: how often each shard was begun, which stage it is in, and how many
records are finished.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from stages.executors.watchdog import Stuck, Watchdog

if TYPE_CHECKING:
    from stages.executors.job import Advance

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5


class Progress(NamedTuple):
    """finished: records, since the run began. stuck: see Watchdog.stuck."""

    finished: int
    stuck: list[Stuck]


class Counter:
    """On Ray, an actor on the driver's node."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempts: dict[tuple[int, int], int] = {}
        self._finished = 0
        self._watchdog = Watchdog(clock)

    def begin(self, shard: int, group: int) -> int:
        """Returns the number of this attempt: 1, or more if workers died before `end`.

        group: index of the first stage of the group that begins the shard.
        """
        self._attempts[shard, group] = self._attempts.get((shard, group), 0) + 1
        self._watchdog.leave(shard)
        return self._attempts[shard, group]

    def enter(self, shard: int, stage: str, where: str) -> None:
        self._watchdog.enter(shard, stage, where)

    def end(self, shard: int, group: int) -> None:
        self._attempts[shard, group] = 0
        self._watchdog.leave(shard)

    def advance(self, count: int) -> None:
        self._finished += count

    def progress(self, stuck_after: float) -> Progress:
        return Progress(self._finished, self._watchdog.stuck(stuck_after))


def poll_counter(counter: Any, stuck_after: float) -> Progress | None:
    """Returns the progress from a Counter on Ray; None if it doesn't answer. What is wrong then is
    for the run itself to report.
    """
    import ray

    try:
        progress: Progress = ray.get(counter.progress.remote(stuck_after), timeout=5)
    except ray.exceptions.RayError:
        return None
    return progress


class ProgressRelay:
    """Context manager. A thread polls a Counter, calls `advance` with the records finished since
    the last poll, and logs each stuck shard once.
    """

    def __init__(self, poll: Callable[[], Progress | None], advance: Advance) -> None:
        self._poll, self._advance = poll, advance
        self._stop = threading.Event()
        self._reported = 0
        self._logged: set[tuple[int, str, str]] = set()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self.relay()
        self.relay()

    def relay(self) -> None:
        """Polls once."""
        progress = self._poll()
        if progress is None:
            return
        for shard in progress.stuck:
            if (key := (shard.shard, shard.stage, shard.where)) not in self._logged:
                self._logged.add(key)
                logger.warning("%s; its worker is ended and the shard is tried again", shard)
        if progress.finished > self._reported:
            self._advance(progress.finished - self._reported)
            self._reported = progress.finished
