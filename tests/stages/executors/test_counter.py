"""The counter of attempts, and the relay of progress from the counter to the caller."""

from __future__ import annotations

import logging

import pytest

from stages.executors.counter import Counter, Progress, ProgressRelay
from stages.executors.watchdog import Stuck


def test_attempts_are_counted_for_each_shard_and_group_until_one_ends() -> None:
    counter = Counter()
    assert [counter.begin(1, 0), counter.begin(1, 0), counter.begin(1, 0)] == [1, 2, 3]
    assert (counter.begin(2, 0), counter.begin(1, 3)) == (1, 1)
    counter.end(1, 0)
    assert (counter.begin(1, 0), counter.begin(1, 3)) == (1, 2)


def test_a_shard_is_stuck_until_it_begins_again_or_ends() -> None:
    now = 0.0
    counter = Counter(lambda: now)
    for shard in (1, 2):
        counter.begin(shard, 0)
        counter.enter(shard, "parse", "a")
    counter.advance(8)
    counter.advance(1)
    now = 9.0
    assert counter.progress(5.0) == Progress(
        9, [Stuck(1, "parse", "a", 9.0), Stuck(2, "parse", "a", 9.0)]
    )
    counter.begin(1, 0)
    counter.end(2, 0)
    assert counter.progress(5.0) == Progress(9, [])


def test_the_relay_advances_by_new_records_and_logs_a_stuck_shard_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports = [
        Progress(3, []),
        None,
        Progress(3, [Stuck(1, "parse", "a", 9.0)]),
        Progress(10, [Stuck(1, "parse", "a", 9.5), Stuck(1, "parse", "b", 9.5)]),
    ]
    advanced: list[int] = []
    relay = ProgressRelay(iter(reports).__next__, advanced.append)
    with caplog.at_level(logging.WARNING):
        for _ in reports:
            relay.relay()
    assert advanced == [3, 7]
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "shard 1 has been stuck in parse for 9 s ",
        "shard 1 has been stuck in parse for 10 s",
    ], "once for each worker that hangs"


def test_records_that_finish_last_are_relayed_at_the_end() -> None:
    advanced: list[int] = []
    with ProgressRelay(lambda: Progress(5, []), advanced.append):
        pass
    assert sum(advanced) == 5
