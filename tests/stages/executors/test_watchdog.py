"""The watchdog reports shards without progress for too long, and no others."""

from __future__ import annotations

from stages.executors.watchdog import Stuck, Watchdog


def test_stuck_shards_longest_first() -> None:
    now = 0.0
    watchdog = Watchdog(lambda: now)
    watchdog.enter(1, "detect", "a")
    now = 5.0
    watchdog.enter(2, "parse", "b")
    watchdog.enter(3, "parse", "c")
    watchdog.leave(3)
    watchdog.leave(4)
    now = 10.0
    assert watchdog.stuck(10.0) == []
    assert watchdog.stuck(7.0) == [Stuck(1, "detect", "a", 10.0)]
    assert watchdog.stuck(3.0) == [Stuck(1, "detect", "a", 10.0), Stuck(2, "parse", "b", 5.0)]
    watchdog.enter(1, "detect", "a")
    assert watchdog.stuck(3.0) == [Stuck(2, "parse", "b", 5.0)], "the next chunk is progress"


def test_message_names_shard_stage_time_and_place() -> None:
    assert str(Stuck(7, "embed", "node-1, process 42", 61.4)) == (
        "shard 7 has been stuck in embed for 61 s (node-1, process 42)"
    )
