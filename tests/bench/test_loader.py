"""The benchmark of loaders: epochs that are read, resumed and compared."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.loader import Contender, Trial, continued, print_speeds
from bench.loaders import Reading, Task, read_epoch
from train.shards import ShardSet

BATCHES = 4  # of two samples


def epoch(data: Path) -> Task:
    return Task(data=str(data), batch_size=2, workers=0, seed=0)


def test_ours_continues_exactly(data: Path, shards: ShardSet) -> None:
    whole = read_epoch("ours", epoch(data), save_at=3)
    assert len(whole.keys) == BATCHES and not whole.error
    assert {key for batch in whole.keys for key in batch} == {
        shards.key(number) for number in range(len(shards))
    }
    rest = read_epoch("ours", replace(epoch(data), batches=3, state=whole.state))
    assert continued(whole, 3, rest).split() == ["True", "0", "0"]


def test_a_process_forks_for_each_epoch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").symlink_to(data)
    contender = Contender("webdataset", Path(sys.executable), tmp_path / "data")
    try:
        whole = contender.read(epoch(data), save_at=3)
        saved = replace(epoch(data), batches=3)
        rest = contender.read(saved)
        failed = contender.read(replace(epoch(data), workers=4))  # and it has three shards
    finally:
        contender.end()
    assert len(whole.keys) == BATCHES and whole.memory[1] > 50
    assert continued(whole, 3, rest).split() == ["True", "0", "0"]
    assert continued(whole, 3, failed).startswith("ValueError: ")
    print_speeds([Trial(contender, whole, saved, [whole], [rest])])
    assert "1.00 (1.00, 1.00)" in capsys.readouterr().out


def test_lost_and_doubled_samples_are_counted() -> None:
    whole = Reading(keys=[["a", "b"], ["c", "d"], ["e", "f"]])
    assert continued(whole, 1, Reading(keys=[["c", "d"], ["b", "e"]])).split() == [
        "False",
        "1",
        "1",
    ]
    assert continued(whole, 1, Reading(keys=[["d", "c"], ["e", "f"]])).split() == [
        "False",
        "0",
        "0",
    ]
    assert continued(whole, 1, Reading(error="ValueError: no")) == "ValueError: no"
