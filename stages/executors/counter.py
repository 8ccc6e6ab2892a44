"""What is known outside the workers: how often each shard was begun, where each one is, and how
much is done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from stages.executors.watchdog import Stuck, Watchdog

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]  # told how many more records are done


def start_counter() -> Any:
    """The counter, on the driver's own node: no other node's death takes it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(
        Counter
    ).remote()


class Counter:
    """Survives the workers; an actor beside the driver."""

    def __init__(self) -> None:
        self._begun: dict[tuple[int, int], int] = {}
        self._done = 0
        self._watchdog = Watchdog()

    def begin(self, shard: int, group: int) -> int:
        """1 the first time, 2 after one worker has died of the shard, and so on."""
        self._begun[shard, group] = self._begun.get((shard, group), 0) + 1
        self._watchdog.done(shard)
        return self._begun[shard, group]

    def at(self, shard: int, stage: str, where: str) -> None:
        self._watchdog.at(shard, stage, where)

    def end(self, shard: int, group: int) -> None:
        self._begun[shard, group] = 0
        self._watchdog.done(shard)

    def advance(self, count: int) -> None:
        self._done += count

    def look(self, stuck_after: float) -> tuple[int, list[Stuck]]:
        """How many records are done, and which shards are stuck."""
        return self._done, self._watchdog.stuck(stuck_after)


class Relay:
    """Carries progress to `advance` twice a second, while the driver waits for shards, and names
    those that hang.
    """

    def __init__(self, counter: Any, advance: Advance, stuck_after: float) -> None:
        self._counter, self._advance, self._stuck_after = counter, advance, stuck_after
        self._stop = threading.Event()
        self._seen = 0
        self._said: set[tuple[int, str, str]] = set()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            self._poll()
        self._poll()

    def _poll(self) -> None:
        import ray

        try:
            done, stuck = ray.get(self._counter.look.remote(self._stuck_after), timeout=5)
        except ray.exceptions.RayError:
            return  # progress is a courtesy: the run itself will say what is wrong
        for shard in stuck:
            if (key := (shard.shard, shard.stage, shard.where)) not in self._said:
                self._said.add(key)
                logger.warning("%s; its worker is ended and the shard tried again", shard)
        if done > self._seen:
            self._advance(done - self._seen)
            self._seen = done
