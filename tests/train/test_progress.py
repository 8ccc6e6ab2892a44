"""The lines that a training prints where there is no terminal."""

from __future__ import annotations

import re

import pytest

from train.progress import TrainingProgress


def test_the_last_step_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(quiet=False) as progress:
        progress.start("training", 0, 1000, 16)
        for step in range(1, 1001):
            progress.step(step, {"loss": 0.5, "lr": 1e-4} if step % 500 == 0 else None)
    line = capsys.readouterr().err
    shown = re.fullmatch(
        r"training: step 1,000/1,000  loss 0\.5  lr 0\.0001  (\S+) samples/s  0:00:00 left\n", line
    )
    assert shown and float(shown[1]) > 0


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(quiet=True) as progress:
        progress.message("hello")
        progress.start("training", 0, 1, 16)
        progress.step(1, {"loss": 0.5})
    assert capsys.readouterr().err == ""
