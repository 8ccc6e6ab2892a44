"""Progress of runs and of lint: a line every few seconds, or a bar on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest

from pipelines.progress import Progress, Unit

LINES: dict[Unit, list[str]] = {
    "images": ["200/1,000 images, 50.0/s, 16 s left", "400/1,000 images, 33.3/s, 18 s left"],
    "shards": ["200/1,000 shards, 50.0/s, 16 s left", "400/1,000 shards, 33.3/s, 18 s left"],
    "bytes": [
        "200.0 of 1,000.0 MB, 50.0 MB/s, 16 s left",
        "400.0 of 1,000.0 MB, 33.3 MB/s, 18 s left",
    ],
}


@pytest.mark.parametrize("unit", LINES)
def test_without_a_terminal_a_line_every_few_seconds_has_rate_and_time_left(
    unit: Unit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=count(0, 4).__next__)  # four seconds between two calls
    monkeypatch.setattr("pipelines.progress.time", clock)
    step = 100_000_000 if unit == "bytes" else 100
    with Progress(10 * step, unit) as progress:
        for _ in range(4):
            progress.advance(step)
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == LINES[unit]


@pytest.mark.parametrize(("options", "expected"), [([], "0.3 of 0.3 MB"), (["--fast"], "2/2")])
def test_lint_shows_a_bar_on_a_terminal(options: list[str], expected: str) -> None:
    terminal, side = os.openpty()
    command = [sys.executable, "-m", "pipelines.cli", "lint", "tests/data/dataset_v2", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side)
    os.close(side)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # the process has ended
        os.close(terminal)
    assert process.communicate()[0] == b"2 shards checked, no faults\n"
    assert expected in shown.decode() and "ETA" in shown.decode()
