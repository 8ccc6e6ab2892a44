"""Progress: shows the progress of a run."""

from __future__ import annotations

import time
from collections import Counter

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from stages.storage.manifest import Manifest


class Progress:
    """A context that shows progress: on a terminal a bar with images/s and ETA, elsewhere a line
    every few seconds; both with the most frequent reasons of dropped and failed inputs.
    """

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[reasons]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._prints_lines = not console.is_terminal
        self._task = self._bar.add_task("images", total=total, rate="", reasons="")
        self._total, self._done, self._started, self._last_line = total, 0, 0.0, time.time()
        self._reason_counts: Counter[str] = Counter()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Adds `count` processed images."""
        now = time.time()
        # time is measured from the first images on, when models are loaded
        self._started = self._started or now
        self._done += count
        rate = self._done / max(now - self._started, 1e-9) if now - self._started > 1 else 0.0
        self._bar.update(self._task, advance=count, rate=f"{rate:.1f}/s" if rate else "")
        if self._prints_lines and now - self._last_line > 5:
            self._last_line = now
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            typer.echo(
                f"  {self._done:,}/{self._total:,} images, {rate:.1f}/s{left}{self._reasons()}",
                err=True,
            )

    def note(self, manifest: Manifest) -> None:
        """Adds the dropped and failed inputs of a committed shard, by reason."""
        self._reason_counts.update(manifest.dropped)
        self._reason_counts.update(manifest.failed)
        self._bar.update(self._task, reasons=self._reasons())

    def _reasons(self) -> str:
        return "".join(
            f"  {reason} {count}" for reason, count in self._reason_counts.most_common(4)
        )
