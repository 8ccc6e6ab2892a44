"""Progress of a training command: rate and remaining time."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Final

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_RATE_PERIOD: Final = 120.0  # seconds; the first epoch, which encodes the samples, is slower
_LINE_PERIOD: Final = 10.0  # seconds


class TrainingProgress:
    """A context manager that shows a bar on a terminal, and else a line every ten seconds at most.

    Is a train.trainer.Watcher and a train.base_model.part.PartWatcher. quiet: shows nothing, for
    all processes but the first.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._has_bar = quiet, not quiet and sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not self._has_bar,
            speed_estimate_period=_RATE_PERIOD,
        )
        self._task = self._bar.add_task("", total=1, rate="", loss="", visible=False)
        self._batch_size, self._last_line = 0, 0.0

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        if not self._quiet:
            typer.echo(text, err=True)

    def start(self, name: str, step: int, total: int, batch_size: int, unit: str = "step") -> None:
        """Shows a new task. step: how many of its `total` steps were done before. batch_size:
        samples a step. unit: what is counted.
        """
        self._batch_size, self._last_line = batch_size, time.monotonic()
        self._bar.reset(
            self._task, description=f"{name}: {unit}", total=total, completed=step, visible=True
        )

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        task = self._bar.tasks[0]
        if step <= task.completed:  # workers of Ray were started again, from a checkpoint
            self._bar.reset(self._task, total=task.total, completed=step)
        self._bar.update(self._task, completed=step)
        rate = f"{(task.speed or 0) * self._batch_size:.1f} samples/s"
        self._bar.update(self._task, rate=rate)
        if losses is None:
            return
        shown = [f"{name} {value:.4g}" for name, value in losses.items()]
        self._bar.update(self._task, loss=next(iter(shown), ""))
        now = time.monotonic()
        if not self._has_bar and (now - self._last_line >= _LINE_PERIOD or task.finished):
            self._last_line = now
            left = timedelta(seconds=task.time_remaining or 0)
            self.message(
                "  ".join(
                    [f"{task.description} {step:,}/{task.total:,.0f}", *shown, rate, f"{left} left"]
                )
            )
